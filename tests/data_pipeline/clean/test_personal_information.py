"""The addresses that are replaced are those that datatrove's formatter replaces."""

from __future__ import annotations

import time

import pytest
from datatrove.pipeline.formatters import PIIFormatter
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.clean import personal_information
from data_pipeline.clean.personal_information import EMAILS, IPS, replace_personal_information
from data_pipeline.clean.settings import PersonalInformationSettings

MARK = "\ue000"
SETTINGS = PersonalInformationSettings()
THEIRS = PIIFormatter(email_replacement=(MARK,), ip_replacement=(MARK,))


@settings(max_examples=1500, deadline=None)
@given(st.text(alphabet=st.sampled_from("a.@-!_ Z9\u00e9[]:8.@..a12@"), max_size=40))
@example("mail a..b@x.com, .c@x.org. d.@x.com \u00e9f@x.com !g@x.com h@x h@[8.8.8.8] i@x.com@y.com j@k.l.m-@n.o")
@example("8.8.8.8 10.0.0.1 127.0.0.1 1.2.3.4.5 256.1.1.1 08.8.8.8 1.1.1.999 8.8.8.8.example")
@example("a@b.c.d@e.f @a@b.cc a@@b.cc a@b..cc \u4e2d@b.cc a@b.c\u00e9")
def test_places_are_datatroves(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personal_information, "EMAILS", (MARK,))
        patch.setattr(personal_information, "IPS", (MARK,))
        assert replace_personal_information(text, SETTINGS) == THEIRS.format(text)


@given(st.text(alphabet=st.sampled_from("a.@b 8.8.8.8 x.org"), max_size=60))
def test_replacing_twice_is_replacing_once(text: str) -> None:
    once = replace_personal_information(text, SETTINGS)
    assert replace_personal_information(once, SETTINGS) == once


def test_the_same_address_becomes_the_same_example_wherever_it_stands() -> None:
    text = "ann@mail.com and bob@mail.com at 8.8.8.8; "
    first = replace_personal_information(text, SETTINGS)
    assert replace_personal_information("zoe@other.com " + text * 2, SETTINGS).endswith(first * 2)
    assert not {"ann@mail.com", "bob@mail.com", "8.8.8.8"} & set(first.replace(";", "").split())
    assert set(EMAILS + IPS) & set(first.replace(";", "").split())


def test_each_kind_has_its_switch() -> None:
    text = "ann@mail.com 8.8.8.8"
    emails = replace_personal_information(text, PersonalInformationSettings(public_ips=False))
    ips = replace_personal_information(text, PersonalInformationSettings(emails=False))
    assert emails.endswith(" 8.8.8.8")
    assert ips.startswith("ann@mail.com ")
    assert "ann@mail.com" not in emails


def test_time_is_linear_in_a_run_of_letters() -> None:
    start = time.process_time()
    long = "a" * 300_000
    for text in (long + "@", long + "@" + long, "@" + long, "a@" * 100_000, long + ".@x.com", "a." * 150_000 + "@x"):
        replace_personal_information(text, SETTINGS)
    assert time.process_time() - start < 3
