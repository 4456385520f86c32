"""Plans: units of work that cover each element once, shared by ranks."""

from __future__ import annotations

from helpers.large_models import large_models

from weightops import open_checkpoint
from weightops.engine.plan import SEGMENT, plan, units
from weightops.engine.ranks import Ranks


def test_units_cover_each_element_once() -> None:
    form = open_checkpoint(large_models()[0]).form
    covered: dict[str, list[tuple[int, int]]] = {}
    for batch in units(plan(form)):
        assert sum(s.stop - s.start for s in batch) < 2 * SEGMENT
        for segment in batch:
            covered.setdefault(segment.step.name, []).append((segment.start, segment.stop))
    for name, spans in covered.items():
        spans.sort()
        assert [a for a, _ in spans] == [0, *(b for _, b in spans)][:-1]
        assert spans[-1][1] == form.specs[name].numel


def test_ranks_share_all_units() -> None:
    work = units(plan(open_checkpoint(large_models()[0]).form), 1 << 16)
    shares = [Ranks(index, 3).share(work) for index in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(len(work)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
