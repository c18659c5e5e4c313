"""The proof's tables as Markdown, from the JSON alone."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.proof.settings import BASE, CRITIC, FIGURES, ORACLE, POLICIES, POPE_KINDS
from sima_ray.ports import JsonDict
from sima_ray.runtime.progress import duration

_LABELS = {
    "chair_s": "CHAIR_s ↓",
    "chair_i": "CHAIR_i ↓",
    "recall": "recall ↑",
    "errors": "errors a caption ↓",
    "objects": "objects",
    "length": "words",
}
_MEANINGS = {
    "CHAIR_s": "share of captions that name an object which is not in the image",
    "CHAIR_i": "share of the named objects that are not in the image",
    "recall": "share of the image's objects that are named",
    "errors a caption": "objects, sizes, places, fadings and backgrounds that are wrong or missing, against the "
    "scene itself",
    "objects, words": "named objects and words a caption",
    "POPE": "share of right answers to whether an object is in the image; the absent ones asked for are random, "
    "popular in all images, or chosen by what is present (adversarial)",
    "order 12, 21": "the critic sees the greedy candidate as Response 1 and the sampled one as Response 2; or the "
    "reverse",
}
_KINDS = {
    "accuracy": "all",
    "equal_length": "equally many objects",
    "longer_better": "the better has more",
    "shorter_better": "the better has fewer",
}
_INTRODUCTION = """The policy of the demo answers each prompt twice, once greedily and once sampled, \
compares the two with the ground truth before it, and is trained by DPO on its own verdicts. \
Is it the critic's doing? The arms below are trained on the same candidates in the same way, \
and differ in which of the two is preferred."""


def markdown(proof: JsonDict) -> str:
    """Every table, one below the other."""
    policies = {arm.name for arm in POLICIES}
    main = [name for name in proof["arms"] if name not in policies]
    departing = [name for name in proof["arms"] if name in policies]
    parts = [
        "# Proof",
        _INTRODUCTION,
        _made(proof),
        "![Before and after one round; recall against CHAIR_s of all arms](proof.svg)",
        _legend(_MEANINGS),
        "## Gate",
        "A line holds by its measured value, or by its interval where it says so. "
        "Differences are the critic's arm minus the other one, here and in all tables.",
        gate_table(proof["gate"]),
        "## Arms after one round",
        _abouts(proof, main),
        _scope(proof),
        _arms(proof, main),
        "The critic's arm minus each other one, paired by image:",
        _differences(proof, [name for name in main if name != CRITIC.name]),
        *_share(proof),
        *_same_candidates(proof),
        *(_policies(proof, departing) if departing else ()),
        "## Rounds",
        f"Seed {proof['seeds']['dpo'][0]} of the critic's arm; intervals over test images alone.",
        _rounds(proof),
        "## Choice of the setting",
        f"Validation world, one seed, intervals over its images alone. Rule: {proof['choice']['rule']}.",
        _choice(proof["choice"]),
        "## Critic",
        "Share of right single critiques on the policy's own candidates, by order and by what sets the better "
        f"candidate apart, with {_confidence(proof)} intervals; ties of the judge are left out.",
        _critic(proof),
    ]
    return "\n\n".join(parts) + "\n"


def gate_table(lines: Sequence[JsonDict]) -> str:
    """What must hold, what was measured, and whether it holds."""
    rows = [
        (
            line["what"],
            line["must"],
            "not measured" if line["measured"] is None else _number(line, "measured"),
            "yes" if line["holds"] else "**no**",
        )
        for line in lines
    ]
    return _table(("", "must be", "measured", "holds"), rows)


def holds(lines: Sequence[JsonDict]) -> str:
    """How many lines of the gate hold."""
    return f"holds {sum(line['holds'] for line in lines)} of {len(lines)}"


def _made(proof: JsonDict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in proof["versions"].items())
    revisions = proof["revisions"]
    of = f"revision{'s' * (len(revisions) > 1)} {', '.join(revisions)}"
    if len(revisions) > 1 or any(revision.endswith("-dirty") for revision in revisions):
        of = f"**{of}**"
    return (
        f"Made by `{proof['command']}` on {proof['date']} in {duration(proof['wall_s'])} of wall time "
        f"({versions}; runs at {of}, tables at {proof['aggregated_at']}). "
        f"The gate {holds(proof['gate'])} lines."
    )


def _legend(meanings: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in meanings.items())


def _abouts(proof: JsonDict, names: Iterable[str]) -> str:
    return _legend({name: proof["arms"][name]["about"] for name in names})


def _scope(proof: JsonDict) -> str:
    chosen, seeds = proof["choice"]["chosen"], len(proof["seeds"]["dpo"])
    return (
        f"{proof['images']} test images, {seeds} DPO seeds; {chosen['prompts']:,} prompts, learning rate "
        f"{chosen['learning_rate']:g}, {chosen['epochs']} epochs: the setting was chosen with the critic's "
        f"pairs on the validation world, and all arms have it. {_confidence(proof)} intervals cover test images "
        f"and DPO seeds (both drawn anew; {seeds} seeds are few); prompts and candidates were drawn once, which "
        "they do not cover. Below each figure, the least and the most of a seed. "
        "Numbers of pairs, by seed, differ by arm, since ties give no pair."
    )


def _policies(proof: JsonDict, departing: Sequence[str]) -> list[str]:
    return [
        "## What becomes of inconsistent verdicts, and of lengths",
        _defaults(proof),
        _abouts(proof, departing),
        _arms(proof, [CRITIC.name, *departing]),
        "The critic's arm minus each other one:",
        _differences(proof, departing),
    ]


def _defaults(proof: JsonDict) -> str:
    pairs = proof["settings"]["pairs"]
    settings = ", ".join(f"`{key}: {'none' if v is None else v}`" for key, v in pairs.items())
    return (
        f"The critic's arm above has the config's `pairs`: {settings}. A verdict is inconsistent where the "
        "two orders prefer different candidates. The arms here depart from that, each in one setting:"
    )


def _same_candidates(proof: JsonDict) -> list[str]:
    if "same_candidates" not in proof:
        return []
    same = proof["same_candidates"]
    return [
        f"The two layouts' arms come of two runs. Of {same['of']:,} prompts that both judged, "
        f"{same['same']:,} had the same candidates in both: sampling repeats, up to rounding."
    ]


def _confidence(proof: JsonDict) -> str:
    return f"{proof['settings']['confidence']:.0%}"


def _arms(proof: JsonDict, names: Iterable[str]) -> str:
    rows = []
    for name in names:
        arm = proof["arms"][name]
        figures = (f"{_number(arm[key])}{_range(arm['by_seed'][key])}" for key in FIGURES)
        rows.append((_bold(name), *figures, " / ".join(f"{count:,}" for count in arm["pairs"])))
    return _table(("", *(_LABELS[key] for key in FIGURES), "pairs"), rows)


def _range(seeds: Sequence[float]) -> str:
    return f"<br>{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else ""


def _differences(proof: JsonDict, names: Iterable[str]) -> str:
    rows = [
        (name, *(_number(proof["differences"][name][key], sign="+") for key in FIGURES))
        for name in names
    ]
    return _table(("critic minus", *(_LABELS[key] for key in FIGURES)), rows)


def _share(proof: JsonDict) -> list[str]:
    if "share_of_oracle" not in proof:
        return []
    share = proof["share_of_oracle"]
    return [f"Of the {ORACLE.name}'s gain in errors a caption, the critic has {_number(share)}."]


def _rounds(proof: JsonDict) -> str:
    pope = proof["pope_intervals"]
    base = {**proof["arms"][BASE], "round": BASE, "pope": pope, "pairs": None}
    rows = [
        (
            str(entry["round"]),
            *(_number(entry[key]) for key in FIGURES),
            *(_number(entry["pope"][kind]) for kind in POPE_KINDS),
            "" if entry["pairs"] is None else f"{entry['pairs']:,}",
        )
        for entry in (base, *proof["rounds"])
    ]
    head = ("round", *(_LABELS[key] for key in FIGURES), *(f"POPE {kind}" for kind in POPE_KINDS))
    return _table((*head, "pairs"), rows)


def _choice(choice: JsonDict) -> str:
    rows = [(BASE, "", "", *(_number(choice["base"][key]) for key in FIGURES), "", "")]
    for entry in choice["settings"]:
        setting = {key: entry[key] for key in choice["chosen"]}
        rows.append(
            (
                f"{entry['prompts']:,}",
                f"{entry['learning_rate']:g}",
                str(entry["epochs"]),
                *(_number(entry[key]) for key in FIGURES),
                f"{entry['pairs']:,}",
                "**yes**" if setting == choice["chosen"] else "",
            )
        )
    head = ("prompts", "learning rate", "epochs", *(_LABELS[key] for key in FIGURES))
    return _table((*head, "pairs", "chosen"), rows)


def _critic(proof: JsonDict) -> str:
    found = [value for key, value in proof.items() if _is_critic(key, value)]
    head = ["", *(f"{c['layout'].replace('_', ' ')}, {o}" for c in found for o in ("12", "21"))]
    rows = [
        (label, *(_counted(part) for critic in found for part in critic["intervals"][kind]))
        for kind, label in _KINDS.items()
    ]
    both = {
        "consistent": "both orders agree",
        "consistent_without_ties": "… without ties of the judge",
        "unparseable": "unparseable",
    }
    rows += [
        (label, *(cell for c in found for cell in (_counted(c["intervals"][key]), "")))
        for key, label in both.items()
    ]
    rows.append(("ties of the judge", *(x for c in found for x in (str(c["counts"]["ties"]), ""))))
    return _table(head, rows)


def _is_critic(key: str, value: object) -> bool:
    return key.startswith(CRITIC.name) and isinstance(value, Mapping) and "intervals" in value


def _number(figure: JsonDict, key: str = "value", sign: str = "") -> str:
    text = f"{figure[key]:{sign}.3f}"
    if "low" in figure:
        text += f" [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"
    return text


def _counted(share: JsonDict) -> str:
    return f"{_number(share)} {share['hits']}/{share['of']}"


def _bold(name: str) -> str:
    return f"**{name}**" if name == CRITIC.name else name


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
