# ruff: noqa: RUF001 (Chinese has its own commas)
"""Reference text as kernel and Perl people write it, by hand: what the documentation profile keeps, and what it drops.

The shares of the real thing (the packages linux-doc-6.12 and perl-doc) are in docs/data.md, from
``tests/benchmarks/profiles.py``.
"""

from __future__ import annotations

import pytest
from datatrove.data import Document

from data_pipeline.clean.pipeline import DocumentCleaner
from data_pipeline.clean.profiles import ProfileName
from data_pipeline.clean.rulings import without_rulings
from data_pipeline.clean.settings import CleanSettings

RST_WITH_TABLES = """
==========================
Driver for the FX90 sensor
==========================

Supported chips:

  * Forest Instruments FX90

    Prefix: 'fx90'

    Addresses scanned: I2C 0x48 - 0x4f

Description
-----------

The FX90 measures two temperatures and four voltages. Limits are kept by the chip, and an alarm stays set until the
attribute is read. Writing ``1`` to ``fan1_enable`` starts the fan at the duty cycle last set.

sysfs interface
---------------

+-----------------+-----------------------+--------+-----------------------------+
| Attribute       | What it is            | Access | Unit                        |
+=================+=======================+========+=============================+
| temp1_input     | on the board          | ro     | thousandths of a degree     |
+-----------------+-----------------------+--------+-----------------------------+
| temp1_max       | upper limit           | rw     | thousandths of a degree     |
+-----------------+-----------------------+--------+-----------------------------+
| in0_input       | supply                | ro     | millivolts                  |
+-----------------+-----------------------+--------+-----------------------------+
| fan1_enable     | on or off             | rw     | none                        |
+-----------------+-----------------------+--------+-----------------------------+

======== ========= =========================
Register Name      Meaning
======== ========= =========================
0x00     STATUS    bit 0: busy, bit 1: alarm
0x01     CONTROL   bit 0: start
0x02     LIMIT_LO  low byte of the limit
0x03     LIMIT_HI  high byte of the limit
======== ========= =========================

.. code-block:: c

    ret = regmap_read(data->regmap, FX90_STATUS, &status);
    if (ret < 0)
            return ret;
"""
RST_CHINESE = """
.. SPDX-License-Identifier: GPL-2.0

============
内核文档示例
============

本文档介绍如何编写驱动程序。在开始之前，请先阅读编码规范，并确认您的邮件客户端不会修改补丁的内容。

提交补丁
--------

请把每一个逻辑上独立的修改放在单独的补丁里。补丁的说明应该解释为什么需要这个修改，以及它解决了什么问题。
如果修改会影响性能，请给出测量的数据和测量的方法。维护者会阅读您的说明，然后决定是否接受这个补丁，因此请认真编写。

* 先运行检查脚本，再发送邮件。
* 不要在同一个补丁里既移动代码又修改代码。
* 收到意见以后，请在新的版本里说明改变了什么地方。
"""
POD = """
=head1 NAME

perlsample - how tied scalars are refreshed

=head1 SYNOPSIS

    use Sample::Tie;
    tie my $value, 'Sample::Tie', { file => '/var/run/level', every => 5 };
    print "$value\\n";    # reads the file at most every five seconds

=head1 DESCRIPTION

A tied scalar calls C<FETCH> each time that it is read. C<Sample::Tie> keeps the last value, and reads the file again
only when C<every> seconds have passed since then. See L<perltie> for the other methods.

=over 4

=item file

The path to read. Trailing newlines are removed, as C<chomp> does.

=item every

Seconds between two reads; 0 reads each time.

=back

=head1 DIAGNOSTICS

=over 4

=item Cannot read %s: %s

(F) The file could not be opened. The second part is the system's own message, see L<perlvar/$!>.

=item Interval %s is negative

(W misc) C<every> was taken to be 0.

=back

=head1 SEE ALSO

L<perltie>, L<perlvar>, L<Tie::Scalar>
"""
TABLE_OF_CONTENTS = (
    """
.. SPDX-License-Identifier: GPL-2.0

===================
Sensors of the FX90
===================

.. toctree::
   :maxdepth: 1

   overview
   registers
   firmware
   sysfs
   troubleshooting
   changes
   authors
   index
"""
    + "   appendix\n" * 3
)
BARE_NUMBERS = "\n".join(
    f"{number:4d}  0x{number * 2654435761 % 2**32:08x}  {number * 7919 % 997:3d}.0" for number in range(150)
)
LOG = "\n".join(
    f"[{second:8d}.000000] usb 1-1: reset high-speed USB device number 4 using xhci_hcd" for second in range(150)
)
RULINGS_ONLY = "\n".join(["=" * 60, "-" * 60, "+" + "-----+" * 10] * 40) + "\nEnd"


def reason(profile: ProfileName, text: str) -> str | None:
    drop = DocumentCleaner(CleanSettings(profile=profile)).clean(Document(text=text, id="0"))
    return drop and drop[1]


@pytest.mark.parametrize("text", [RST_WITH_TABLES, RST_CHINESE, POD], ids=["tables", "chinese", "pod"])
def test_documentation_keeps_reference_text_that_rules_for_the_web_drop(text: str) -> None:
    assert reason("documentation", text) is None
    assert reason("web", text) is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TABLE_OF_CONTENTS, "gopher_short_doc"),
        (BARE_NUMBERS, "gopher_below_alpha_threshold"),
        (LOG, "duplicated_5_n_grams"),
        (RULINGS_ONLY, "gopher_short_doc"),
    ],
    ids=["contents", "numbers", "log", "rulings"],
)
def test_documentation_drops_what_nobody_would_read(text: str, expected: str) -> None:
    assert reason("documentation", text) == expected


def test_tables_and_underlines_are_judged_by_what_is_written_in_them_and_kept_whole() -> None:
    without = CleanSettings.model_validate({"profile": "documentation", "ignore_rulings": False})
    table = RST_WITH_TABLES.split("sysfs interface")[1].split(".. code-block")[0]
    drop = DocumentCleaner(without).clean(Document(text=table, id="0"))
    assert drop == ("quality", "gopher_below_alpha_threshold")
    document = Document(text=table, id="0")
    assert DocumentCleaner(CleanSettings(profile="documentation")).clean(document) is None
    assert document.text == table.strip("\n")


def test_rulings_are_lines_without_a_letter_and_runs_of_one_mark() -> None:
    assert without_rulings("Title\n=====\n\nA table ..... 5\n+---+---+\n| a |\n") == "Title\n\nA table . 5\n| a |\n"
    assert without_rulings("a -- b ... c\n--\n") == "a -- b . c\n"
    mostly_drawn = "x\n" + "=" * 50
    assert without_rulings(mostly_drawn) == mostly_drawn
