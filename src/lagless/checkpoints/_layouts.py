"""How programs name the checkpoints of a run, and where in such a folder the weights lie: two tables.

A new program is a new row, and a test that writes its layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


@dataclass(frozen=True)
class RunLayout:
    """How a program names the checkpoints of a run.

    Attributes:
        program: whose names these are.
        shown: the name for messages, N in place of the number.
        pattern: found in a name without its suffix. Group ``number`` is the number; a pattern without that group leaves
            the number to what the file says of itself (``global_step``).
        suffixes: of files, and of folders named like files; ``""`` for folders without one.
        unit: what the numbers count.
        rank: where a folder holds names of several ranks, the lowest is meant.
        needs: names of which one must be in a folder; none for any folder.
    """

    program: str
    shown: str
    pattern: re.Pattern[str]
    suffixes: tuple[str, ...] = ("", *SUFFIXES)
    unit: Literal["step", "epoch"] = "step"
    rank: int = 1
    needs: tuple[str, ...] = ()


STEP_NAME = re.compile(
    r"(?:^|[-_.=])(checkpoint|ckpt|global_?step|step|iteration|iter)[-_=]?(?P<number>\d+)$", re.IGNORECASE
)

RUN_LAYOUTS = (
    RunLayout(
        "Lightning",
        "epoch=E-step=N.ckpt",
        re.compile(r"^(?:.*[-_/])?epoch=\d+.*?[-_]step=(?P<number>\d+)(?:-.*?)?(?:-v\d+)?$"),
        (".ckpt",),
    ),
    RunLayout(
        "Lightning", "step=N-*.ckpt", re.compile(r"^(?:.*[-_])?step=(?P<number>\d+)(?:-v\d+|-[^=]+=.*)?$"), (".ckpt",)
    ),
    RunLayout("Lightning", "epoch=E-*.ckpt", re.compile(r"^(?:.*[-_])?epoch=\d+.*$"), (".ckpt",)),
    RunLayout(
        "DeepSpeed universal",
        "global_stepN_universal",
        re.compile(r"^global_step(?P<number>\d+)_universal$"),
        ("",),
        rank=0,
    ),
    RunLayout("OLMo", "stepN-unsharded", re.compile(r"^step(?P<number>\d+)-unsharded$"), ("",)),
    RunLayout(
        "timm",
        "checkpoint-N.pth.tar",
        re.compile(r"^checkpoint-(?P<number>\d+)$"),
        (".pth.tar",),
        unit="epoch",
    ),
    # transformers, Accelerate, TRL, axolotl, LLaMA-Factory, ms-swift, diffusers, OLMo-core, torchtitan, Megatron, verl
    RunLayout("", "*-N", STEP_NAME, tuple(s for s in ("", *SUFFIXES) if s != ".pth.tar")),
    RunLayout("torchtune", "epoch_N", re.compile(r"^epoch_(?P<number>\d+)$"), ("",), unit="epoch", rank=2),
    RunLayout(
        "nanotron",
        "N",
        re.compile(r"^(?P<number>\d+)$"),
        ("",),
        rank=3,
        needs=("checkpoint_metadata.json", "model_config.json"),
    ),
)

BELOW = ("checkpoints", "checkpoint", "version_*/checkpoints", "lightning_logs/version_*/checkpoints")
"""Where a run folder may keep its checkpoints, if not at its top."""


@dataclass(frozen=True)
class Inside:
    """Where in the folder of a checkpoint its weights lie.

    Attributes:
        program: who writes it so.
        folders: of the weights, relative to the checkpoint's; several names are parts of a model, of which one may be
            there.
        companions: of configuration and tokenizer, relative to the weights'.
    """

    program: str
    folders: tuple[str, ...]
    companions: str = "."


INSIDE = (
    Inside("OLMo-core", ("model_and_optim",), ".."),
    Inside("verl", ("actor/huggingface", "huggingface")),
    Inside("verl", ("actor",), "huggingface"),
    Inside("diffusers", ("unet", "transformer", "controlnet", "prior", "decoder", "vae", "text_encoder")),
)


def step_named(path: Path) -> tuple[RunLayout, re.Match[str]] | None:
    """Return the row of ``RUN_LAYOUTS`` that the name of ``path`` fits, and what was found; None if there is none.

    >>> layout, match = step_named(Path("epoch=1-step=100.ckpt"))
    >>> layout.program, match["number"]
    ('Lightning', '100')
    """
    stem, suffix = split_suffix(path.name)
    for layout in RUN_LAYOUTS:
        if suffix in layout.suffixes and (match := layout.pattern.search(stem)):
            if not layout.needs or any((path / name).exists() for name in layout.needs):
                return layout, match
    return None


def split_suffix(name: str) -> tuple[str, str]:
    """Return a name in two parts, of which the second is the suffix of a file of weights, or empty.

    >>> split_suffix("checkpoint-3.pth.tar"), split_suffix("step1000")
    (('checkpoint-3', '.pth.tar'), ('step1000', ''))
    """
    suffix = max((s for s in SUFFIXES if name.endswith(s)), key=len, default="")
    return name.removesuffix(suffix), suffix
