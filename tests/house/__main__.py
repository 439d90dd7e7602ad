"""``python -m tests.house``: the rules of size and shape, and what breaks each.

Exit 1 where something is not in the table of exceptions, is more than it says there, or no longer
breaks a rule.
"""

from __future__ import annotations

from tests.house.exceptions import EXCEPTIONS
from tests.house.rules import RULES, Finding


def judge(found: list[Finding], rule: str) -> tuple[list[str], list[str]]:
    """What of one rule is excepted, and what is wrong."""
    table = EXCEPTIONS.get(rule, {})
    known, wrong = [], []
    for f in found:
        most, why = table.get(f.place, (0, ""))
        if f.size <= most:
            known.append(f"{f.place}: {f.text} ({why})")
        else:
            wrong.append(f"{f.place}: {f.text}" + (f"; excepted up to {most}" if most else ""))
    gone = sorted(table.keys() - {f.place for f in found})
    return known, wrong + [f"{place}: mended, so take it out of exceptions.py" for place in gone]


def main() -> int:
    """Print all of it."""
    failed = 0
    for name, rule in RULES.items():
        known, wrong = judge(sorted(rule(), key=lambda f: (-f.size, f.place)), name)
        says = (rule.__doc__ or "").splitlines()[0]
        print(f"{name}: {says} {len(known)} excepted, {len(wrong)} wrong")
        for line in known:
            print(f"  excepted  {line}")
        for line in wrong:
            print(f"  WRONG     {line}")
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
