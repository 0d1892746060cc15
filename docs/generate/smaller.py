"""The section on smaller caches: its tables, and what can be said of them, from three files of results."""

import math
from collections.abc import Iterator

from measured import Result, Row, cell, digits, listed, quartiles, signed, table, times

# Ours, and kvpress's press of the same idea.
COUNTERPARTS = {
    "StreamingLLM": "StreamingLLM",
    "H2O": "ObservedAttention",
    "SnapKV": "SnapKV",
    "TOVA": "TOVA",
    "ExpectedAttention": "ExpectedAttention",
    "KeyNorm": "Knorm",
    "KeyDiff": "KeyDiff",
    "pyramid of SnapKV": "PyramidKV",
    "AdaKV SnapKV": "AdaKV(SnapKV)",
    "AdaKV ExpectedAttention": "AdaKV(ExpectedAttention)",
    "AdaKV KVzip": "KVzip",
}
TWICE = {"KVzip", "AdaKV KVzip"}  # these read the context a second time
BUDGET = "budget, %"


class Quality:
    """The results of quality.py, by side, method and budget."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.rows = {(row["side"], row["method"], row[BUDGET]): row for row in result.rows}
        self.budgets = sorted({row[BUDGET] for row in result.rows if row[BUDGET] < 100}, reverse=True)
        self.full = next(row for row in result.rows if row["method"] == "DynamicCache")

    @property
    def pieces(self) -> int:
        return len(next(iter(self.result.data["losses"].values())))

    @property
    def keys(self) -> int:
        """Pass keys asked for, as far as the shares that were found tell."""
        shares = [row["pass key, %"] / 100 for row in self.result.rows if row["pass key, %"] is not None]
        return next(n for n in range(1, 1000) if all(abs(share * n - round(share * n)) < 1e-6 for share in shares))

    def methods(self) -> list[tuple[str, str]]:
        """Side and method of all that drop tokens, the least perplexity at the smallest budget first."""
        least = self.budgets[-1]
        found = [key for key in self.rows if key[2] == least]
        return [key[:2] for key in sorted(found, key=lambda key: self.rows[key]["perplexity"])]

    def across(self, column: str, form: object = digits) -> str:
        """One figure, by method and budget."""
        header = ["method", "by", *(f"{budget:g} %" for budget in self.budgets)]
        lines = []
        for side, method in self.methods():
            found = [self.rows.get((side, method, budget), {}).get(column) for budget in self.budgets]
            if any(value is not None for value in found):
                lines.append([method, side, *(form(value) for value in found)])  # type: ignore[operator]
        return table(header, lines, words=2)

    def pass_keys(self) -> str:
        return self.across("pass key, %", lambda share: "–" if share is None else f"{share:.0f}")

    def perplexities(self) -> str:
        return self.across("over full", lambda ratio: "–" if ratio is None else signed(100 * (ratio - 1)))

    def whole(self) -> str:
        """What keeps all tokens."""
        header = ["cache", "by", "perplexity", "over full", "pass key, %", "MiB", "ms a token"]
        rows = [row for row in self.result.rows if row[BUDGET] == 100]
        return table(
            header,
            [
                [
                    row["method"],
                    _by(row["side"]),
                    f"{row['perplexity']:.3f}",
                    signed(100 * (row["over full"] - 1), 2),
                    cell(row["pass key, %"] and round(row["pass key, %"])),
                    digits(row["MiB"]),
                    cell(row["ms/token"]),
                ]
                for row in rows
            ],
            words=2,
        )

    def pairs(self) -> str:
        """kvpress's perplexity over ours where both have the method."""
        lines = []
        for ours, theirs in COUNTERPARTS.items():
            found = [
                (self.rows.get(("ours", ours, budget)), self.rows.get(("kvpress", theirs, budget)))
                for budget in self.budgets
            ]
            if all(a and b for a, b in found):
                lines.append(
                    [f"{ours} / {theirs}", *(f"{b['perplexity'] / a['perplexity']:.4f}" for a, b in found if a and b)]
                )
        return table(["ours / kvpress's", *(f"{budget:g} %" for budget in self.budgets)], lines)

    def best(self, side: str, budget: float, twice: bool) -> Row | None:
        rows = [
            row
            for (of, method, at), row in self.rows.items()
            if (of, at) == (side, budget) and (method in TWICE) == twice
        ]
        return min(rows, key=lambda row: row["perplexity"], default=None)

    def contests(self) -> Iterator[str]:
        """Best against best at each budget, among what reads once and what reads twice."""
        for twice in (False, True):
            for budget in self.budgets:
                ours, theirs = (self.best(side, budget, twice) for side in ("ours", "kvpress"))
                if ours is not None and theirs is not None:
                    yield self._contest(budget, ours, theirs, "reading twice" if twice else "reading once")

    def _contest(self, budget: float, ours: Row, theirs: Row, how: str) -> str:
        ratio = theirs["perplexity"] / ours["perplexity"]
        share = budget / 100
        mine, other = (
            self.result.data["losses"][f"{row['side']}, {row['method']}, {share:.4g}"] for row in (ours, theirs)
        )
        wins = sum(a < b for a, b in zip(mine, other, strict=True))
        return (
            f"{budget:g} %, {how}: ours {ours['perplexity']:.3f} ({ours['method']}), kvpress's {theirs['perplexity']:.3f} "
            f"({theirs['method']}): {ratio:.4f}×; ours is the lower in {wins} of {len(mine)} pieces"
        )

    def finding(self) -> str:
        """Which methods still find the pass key with the fewest tokens."""
        least = self.budgets[-1]
        found = [
            (row["pass key, %"], f"{method} ({_by(side)}, {row['pass key, %']:.0f} %)")
            for (side, method, budget), row in self.rows.items()
            if budget == least and row["pass key, %"]
        ]
        return listed(text for _, text in sorted(found, key=lambda pair: -pair[0])) if found else "none"

    def pyramids(self) -> list[str]:
        """The budgets at which kvpress's PyramidKV is its SnapKV, to the last digit."""
        pairs = [
            (budget, *(self.rows.get(("kvpress", name, budget)) for name in ("PyramidKV", "SnapKV")))
            for budget in self.budgets
        ]
        return [f"{budget:g} %" for budget, a, b in pairs if a and b and a["perplexity"] == b["perplexity"]]

    def not_given_back(self) -> list[str]:
        """Our methods that hold much more than the tokens that they keep take."""
        least, whole = self.budgets[-1], self.full["MiB"]
        return [
            method
            for (side, method, budget), row in self.rows.items()
            if side == "ours" and budget == least and row["MiB, held"] > 0.5 * whole
        ]


def _by(side: str) -> str:
    return "transformers, beside kvpress" if side == "full" else side


# ---------------------------------------------------------------------- steps


def parts(result: Result) -> list[str]:
    return list(dict.fromkeys(row["part"] for row in result.rows))


def steps(result: Result, part: str) -> str:
    """What a step costs, one part of the run."""
    rows = result.of(part=part)
    columns: dict[str, list[str]] = {
        "cache": [row["side"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "MiB": [digits(row["MiB"]) for row in rows],
        "ms a step (quartiles)": [quartiles(row, "ms/step") for row in rows],
    }
    if any(row["trim step, ms"] is not None for row in rows):
        columns["trim step, ms"] = [digits(row["trim step, ms"]) for row in rows]
    for kind in ("KeepAll", "DynamicCache"):
        whole, usual = ([signed(row[f"{how}over {kind}, %"]) for row in rows] for how in ("", "typical "))
        columns[f"over `{kind}`"] = whole
        if whole != usual:
            columns[f"typically over `{kind}`"] = usual
    return table(list(columns), zip(*columns.values(), strict=True), words=2)


def always_slower(result: Result, part: str) -> bool:
    """Whether every cache of fewer bits took longer than ours in full precision."""
    return all(row["over KeepAll, %"] > 0 for row in result.of(part=part) if row["side"].startswith("int"))


def dearest(result: Result, part: str, *sides: str) -> str:
    """What these sides cost in a part over the plain cache of their lengths, in words: least to most."""
    found = [row for row in result.of(part=part) if row["side"] in sides]
    found.sort(key=lambda row: row["over KeepAll, %"])
    return listed(f"{row['side']} {signed(row['over KeepAll, %'])}" for row in found)


# ---------------------------------------------------------------------- an endless text


def perplexity_along(result: Result) -> str:
    """Perplexity by span, each side beside the control."""
    beside = "over control's"
    sides = list(dict.fromkeys(row["side"] for row in result.rows))
    read = [row for row in result.rows if row["perplexity"] is not None]
    spans = list(dict.fromkeys(row["where"] for row in read))
    of = {(row["side"], row["where"]): row for row in read}
    lines = []
    for span in spans:
        values = [of.get((side, span)) for side in sides]
        control = next(row["control's"] for row in values if row)
        lines.append(
            [
                span,
                digits(control),
                *(f"{digits(row['perplexity'])}, {times(row[beside])}" if row else "–" for row in values),
            ]
        )
    return table(["tokens", "control", *sides], lines)


def steps_along(result: Result) -> str:
    timed = [row for row in result.rows if row["ms/step"] is not None]
    header = [
        "positions",
        "after tokens",
        "ms a step (quartiles)",
        "plain cache just then, ms",
        "cache, MiB",
        "process, MiB",
    ]
    return table(
        header,
        [
            [
                row["side"],
                row["where"].removeprefix("at "),
                quartiles(row, "ms/step"),
                digits(row["plain, ms/step"]),
                digits(row["cache, MiB"]),
                f"{row['process, MiB']:.0f}",
            ]
            for row in timed
        ],
    )


def spread_of_pieces(result: Result) -> str:
    """How far the pieces' perplexities are apart, for the full cache."""
    losses = result.data["losses"]["transformers, DynamicCache, 1"]
    full = next(row for row in result.rows if row["method"] == "DynamicCache")
    tokens = sum(losses) / math.log(full["perplexity"]) / len(losses)
    values = sorted(math.exp(loss / tokens) for loss in losses)
    return f"{values[0]:.1f} to {values[-1]:.1f}"
