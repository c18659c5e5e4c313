"""The proof's tables as Markdown, from the JSON alone."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.proof.settings import CRITIC, FIGURES, ORACLE, POLICIES, POPE_KINDS
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
_KINDS = {
    "accuracy": "all",
    "equal_length": "equally many objects",
    "longer_better": "the better has more",
    "shorter_better": "the better has fewer",
}


def markdown(proof: JsonDict) -> str:
    """Every table, one below the other."""
    policies = {arm.name for arm in POLICIES}
    main = [name for name in proof["arms"] if name not in policies]
    parts = [
        "# Proof",
        _made(proof),
        "## Gate",
        gate_table(proof["gate"]),
        "## Arms after one round",
        _scope(proof),
        _arms(proof, main),
        "Each arm minus the critic, paired by image:",
        _differences(proof, [name for name in main if name != CRITIC.name]),
        *_share(proof),
        "## What becomes of inconsistent verdicts, and of lengths",
        _arms(proof, [CRITIC.name, *(n for n in proof["arms"] if n in policies)]),
        _differences(proof, [n for n in proof["arms"] if n in policies]),
        "## Rounds",
        f"Seed {proof['seeds']['dpo'][0]}.",
        _rounds(proof),
        "## Choice of the setting",
        f"Validation world, one seed. Rule: {proof['choice']['rule']}.",
        _choice(proof["choice"]),
        "## Critic",
        "Share of right single critiques, by which candidate is shown first, with 95% intervals.",
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
    return (
        f"Made by `{proof['command']}` on {proof['date']} in {duration(proof['wall_s'])} of wall time "
        f"({versions}; revision {proof['revision']}). {holds(proof['gate']).capitalize()}."
    )


def _scope(proof: JsonDict) -> str:
    chosen, confidence = proof["choice"]["chosen"], proof["settings"]["confidence"]
    return (
        f"{proof['images']} test images, {len(proof['seeds']['dpo'])} seeds pooled by image, "
        f"{confidence:.0%} intervals; {chosen['prompts']:,} prompts, learning rate "
        f"{chosen['learning_rate']:g}, {chosen['epochs']} epochs."
    )


def _arms(proof: JsonDict, names: Iterable[str]) -> str:
    rows = []
    for name in names:
        arm = proof["arms"][name]
        pairs = " / ".join(f"{count:,}" for count in dict.fromkeys(arm["pairs"]))
        rows.append((_bold(name), *(_number(arm[key]) for key in FIGURES), pairs))
    return _table(("", *(_LABELS[key] for key in FIGURES), "pairs"), rows)


def _differences(proof: JsonDict, names: Iterable[str]) -> str:
    rows = [
        (name, *(_number(proof["differences"][name][key], sign="+") for key in FIGURES))
        for name in names
    ]
    return _table(("minus critic", *(_LABELS[key] for key in FIGURES)), rows)


def _share(proof: JsonDict) -> list[str]:
    if "share_of_oracle" not in proof:
        return []
    share = proof["share_of_oracle"]
    return [f"Of the {ORACLE.name}'s gain in errors, the critic has {_number(share)}."]


def _rounds(proof: JsonDict) -> str:
    base = {**proof["arms"]["base"], "round": "base", "pope": proof["pope"], "pairs": None}
    rows = [
        (
            str(entry["round"]),
            *(_number(entry[key]) for key in FIGURES),
            *(f"{entry['pope'][kind]:.3f}" for kind in POPE_KINDS),
            "" if entry["pairs"] is None else f"{entry['pairs']:,}",
        )
        for entry in (base, *proof["rounds"])
    ]
    head = ("round", *(_LABELS[key] for key in FIGURES), *(f"POPE {kind}" for kind in POPE_KINDS))
    return _table((*head, "pairs"), rows)


def _choice(choice: JsonDict) -> str:
    rows = [("base", "", "", *(_number(choice["base"][key]) for key in FIGURES), "", "")]
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
