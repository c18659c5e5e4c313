"""`make policy`, or `python -m sima_ray.demo.make_policy`: the demo's policy anew from its seed.

Trains it in three phases (see `maker`), measures it on the validation world, shows what it is held
to, and replaces the checkpoint only where all of that holds. Phases that finished are kept: the same
command goes on after the last one.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path


def main() -> int:
    """Train, measure, replace; 1 where the result does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m sima_ray.demo.make_policy",
        description="Make the demo's policy anew from its seed: about 50 minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out = Path(__file__).parent / "assets" / "policy"
    parser.add_argument("--out", type=Path, default=out, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("runs/policy"), help="finished phases")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    chosen = parser.parse_args()
    # Only now: `--help` must not wait for torch.
    from sima_ray.demo import maker
    from sima_ray.errors import SimaError

    try:
        folder, card = maker.make(chosen.work, chosen.seed)
    except SimaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last phase", file=sys.stderr)
        return 130
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    lines = maker.gate(card)
    print(f"{'on the validation world':<52} {'must be':<12} is")
    print("\n".join(map(str, lines)))
    print(f"took {card['seconds']['total'] / 60:.0f} min")
    if not all(line.holds for line in lines):
        print(f"error: not good enough: it stays in {folder}", file=sys.stderr)
        return 1
    shutil.copytree(folder, chosen.out, dirs_exist_ok=True)
    print(f"written to {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
