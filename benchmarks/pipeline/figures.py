"""What the trials come to: medians over repeats, ratios, and their spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from benchmarks.pipeline.trial import CONTENDERS, Trial
from sima_ray.ports import JsonDict

Repeat = Mapping[str, Trial]
"""The trials of one repeat, by contender."""

ASKED = {
    "vs_raw_vllm": ("at least", 0.85),
    "vs_one_at_a_time": ("at least", 20.0),
    "cache_share": ("at least", 0.98),
    "orders_ratio": ("at most", 0.6),
}
"""What each figure is held against."""


def figures(repeats: Sequence[Repeat]) -> JsonDict:
    """All figures of a benchmark: of at least one repeat, each with a trial of every contender."""
    found = {
        "vs_raw_vllm": [r["ours"].rate / r["raw"].rate for r in repeats],
        "vs_raw_vllm_prepared": [
            r["raw"].more["engine_s"] * r["ours"].rate / r["raw"].rows for r in repeats
        ],
        "vs_raw_vllm_tokens": [
            (r["ours"].tokens / r["ours"].seconds) / (r["raw"].tokens / r["raw"].seconds)
            for r in repeats
        ],
        "vs_one_at_a_time": [r["ours"].rate / r["single"].rate for r in repeats],
        "cache_share": [cache_share(r["ours"].more) for r in repeats],
        "cached_of_all": [cached_of_all(r["ours"].more) for r in repeats],
        "orders_ratio": [r["raw"].more["orders_ratio"] for r in repeats],
        "orders_ratio_prefill": [r["raw"].more["orders_ratio_prefill"] for r in repeats],
        "orders_ratio_tokens": [r["raw"].more["orders_ratio_tokens"] for r in repeats],
        "rows_per_s": [r["ours"].rate for r in repeats],
        "pairs_per_s": [r["ours"].more["pairs"] / r["ours"].seconds for r in repeats],
    }
    whole: JsonDict = {name: statistics.median(values) for name, values in found.items()}
    whole["spread"] = {name: [min(values), max(values)] for name, values in found.items()}
    whole["asked"] = {
        name: {"bar": f"{how} {bar}", "met": met(name, whole[name])}
        for name, (how, bar) in ASKED.items()
    }
    whole["contenders"] = {name: _contender([r[name] for r in repeats]) for name in CONTENDERS}
    whole["repeats"] = [{name: asdict(trial) for name, trial in r.items()} for r in repeats]
    return whole


def cache_share(ours: JsonDict) -> float:
    """Of the tokens that the layout lets a cache have; 1 where it lets it have none.

    Raises:
        ValueError: The engine read other prompts than those that the layout was computed of.
    """
    if ours["critic_prompt_tokens"] != ours["layout_tokens"]:
        raise ValueError(
            f"the engine read {ours['critic_prompt_tokens']} tokens of critiques, "
            f"the processor makes {ours['layout_tokens']}"
        )
    most = ours["layout_cached"]
    return ours["critic_cached_tokens"] / most if most else 1.0


def cached_of_all(ours: JsonDict) -> float:
    """Of all prompt tokens of critiques."""
    return ours["critic_cached_tokens"] / ours["critic_prompt_tokens"]


def met(name: str, value: float) -> bool:
    """Whether a figure is what is asked of it."""
    how, bar = ASKED[name]
    return value >= bar if how == "at least" else value <= bar


def _contender(trials: Sequence[Trial]) -> JsonDict:
    rates = {
        "rows_per_s": [trial.rate for trial in trials],
        "tokens_per_s": [trial.tokens / trial.seconds for trial in trials],
        "seconds": [trial.seconds for trial in trials],
    }
    own: JsonDict = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in rates.items()
    }
    return own | {"rows": trials[0].rows, "setting": trials[0].more.get("setting")}


def table(found: JsonDict) -> str:
    """For a terminal."""
    lines = [f"{'':<8} {'rows':>6} {'seconds':>8} {'rows/s':>24} {'tokens/s':>9}"]
    for name, own in found["contenders"].items():
        rate = own["rows_per_s"]
        text = f"{rate['median']:.2f} [{rate['min']:.2f}, {rate['max']:.2f}]"
        lines.append(
            f"{name:<8} {own['rows']:>6} {own['seconds']['median']:>8.1f} {text:>24} "
            f"{own['tokens_per_s']['median']:>9.0f}"
        )
    lines.append("")
    for name, (low, high) in found["spread"].items():
        asked = found["asked"].get(name)
        note = f"   asked {asked['bar']}{'' if asked['met'] else ': missed'}" if asked else ""
        lines.append(f"{name:<22} {found[name]:7.3f}   [{low:.3f}, {high:.3f}]{note}")
    return "\n".join(lines)
