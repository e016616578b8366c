"""BibTeX for the methods in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lagless._version import __version__

_ENTRIES = {
    "lagless": f"""@software{{lagless,
  title   = {{lagless: averaged weights without the lag}},
  author  = {{{{The lagless authors}}}},
  version = {{{__version__}}},
  url     = {{https://github.com/lagless/lagless}},
}}""",
    "bema": """@article{block2025ema,
  title   = {{EMA} Without the Lag: Bias-Corrected Iterate Averaging Schemes},
  author  = {Block, Adam and Zhang, Cyril},
  journal = {arXiv preprint arXiv:2508.00180},
  year    = {2025},
}""",
    "pace": """@article{au2026training,
  title   = {Training for the Model You Return: Improving Optimization for Iterate-Averaged Language Models},
  author  = {Au, Kwok Chun and Block, Adam},
  journal = {arXiv preprint arXiv:2606.25086},
  year    = {2026},
}""",
    "bias": """@article{nayak2026correcting,
  title   = {Correcting Stochastic Update Bias in Preconditioned Language Model Optimizers},
  author  = {Nayak, Nikhil and White, Julia and Zaratiana, Urchade and Zhang, Kelton and Princis, Henrijs and
             Atreja, Dhruv and Fawcett, Henry and Thomas, Matthew and Hurn-Maloney, George and Lewis, Ash},
  journal = {arXiv preprint arXiv:2605.20756},
  year    = {2026},
}""",
    "schedulefree": """@article{defazio2024road,
  title   = {The Road Less Scheduled},
  author  = {Defazio, Aaron and Yang, Xingyu Alice and Mehta, Harsh and Mishchenko, Konstantin and Khaled, Ahmed and
             Cutkosky, Ashok},
  journal = {arXiv preprint arXiv:2405.15682},
  year    = {2024},
}""",
    "gpa": """@article{defazio2025smoothing,
  title   = {Smoothing {DiLoCo} with Primal Averaging for Faster Training of {LLMs}},
  author  = {Defazio, Aaron and Mishchenko, Konstantin and Raman, Parameswaran and Shi, Hao-Jun Michael and Xiao, Lin},
  journal = {arXiv preprint arXiv:2512.17131},
  year    = {2025},
}""",
    "wsm": """@article{tian2025wsm,
  title   = {{WSM}: Decay-Free Learning Rate Schedule via Checkpoint Merging for {LLM} Pre-training},
  author  = {Tian, Changxin and others},
  journal = {arXiv preprint arXiv:2507.17634},
  year    = {2025},
}""",
    "polyak": """@article{polyak1992acceleration,
  title   = {Acceleration of Stochastic Approximation by Averaging},
  author  = {Polyak, Boris T. and Juditsky, Anatoli B.},
  journal = {SIAM Journal on Control and Optimization},
  volume  = {30},
  number  = {4},
  pages   = {838--855},
  year    = {1992},
}""",
    "swa": """@article{izmailov2018averaging,
  title   = {Averaging Weights Leads to Wider Optima and Better Generalization},
  author  = {Izmailov, Pavel and Podoprikhin, Dmitrii and Garipov, Timur and Vetrov, Dmitry and Wilson, Andrew Gordon},
  journal = {arXiv preprint arXiv:1803.05407},
  year    = {2018},
}""",
    "lawa": """@article{kaddour2022stop,
  title   = {Stop Wasting My Time! Saving Days of {ImageNet} and {BERT} Training with Latest Weight Averaging},
  author  = {Kaddour, Jean},
  journal = {arXiv preprint arXiv:2209.14981},
  year    = {2022},
}""",
    "noise": """@article{mccandlish2018empirical,
  title   = {An Empirical Model of Large-Batch Training},
  author  = {McCandlish, Sam and Kaplan, Jared and Amodei, Dario and {OpenAI Dota Team}},
  journal = {arXiv preprint arXiv:1812.06162},
  year    = {2018},
}""",
    "karras": """@article{karras2024analyzing,
  title   = {Analyzing and Improving the Training Dynamics of Diffusion Models},
  author  = {Karras, Tero and Aittala, Miika and Lehtinen, Jaakko and Hellsten, Janne and Aila, Timo and Laine, Samuli},
  journal = {arXiv preprint arXiv:2312.02696},
  year    = {2024},
}""",
}

_METHODS: Mapping[str, tuple[str, ...]] = {
    "EMA": ("polyak",),
    "BEMA": ("bema",),
    "OUEMA": ("bema",),
    "DEMA": ("bema",),
    "UniformAverage": ("polyak", "swa"),
    "WindowAverage": ("lawa",),
    "PowerEMA": ("karras",),
    "DecayAverage": ("wsm",),
    "WarmupAverage": ("schedulefree",),
    "WarmupEMA": ("polyak",),
    "PACE": ("pace",),
    "PrimalAveraging": ("schedulefree", "gpa"),
    "Pullback": ("pace",),
    "BiasCorrectedAdamW": ("bias",),
    "BiasCorrectedSophia": ("bias",),
    "BiasCorrectedShampoo": ("bias",),
    "GradientNoise": ("noise",),
}


def citation(*methods: object) -> str:
    """Return BibTeX entries for lagless and for the methods given.

    Args:
        methods: rules, optimizers or Averagers that you use, or their classes; none for every method of the library.

    Returns:
        Entries separated by empty lines, each once.

    >>> print(citation().split(",")[0])
    @software{lagless
    """
    names = list(_METHODS) if not methods else [name for method in methods for name in _names(method)]
    keys = ["lagless", *(key for name in names for key in _METHODS.get(name, ()))]
    return "\n\n".join(_ENTRIES[key] for key in dict.fromkeys(keys))


def _names(method: object) -> Iterable[str]:
    """Yield the names of the classes that ``method`` is, and of the rules that it follows."""
    kind = method if isinstance(method, type) else type(method)
    yield from (base.__name__ for base in kind.__mro__)
    rules = getattr(method, "rules", None)
    if isinstance(rules, Mapping):
        for rule in rules.values():
            yield from _names(rule)
