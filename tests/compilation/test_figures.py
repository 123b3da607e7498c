"""The figures of docs/pods.md: the page shows what benchmarks/tpu_compile.json holds, and that keeps its limits."""

import json

import pytest

from benchmarks import tpu_compile as benchmark
from npedit_jax.models import layers

LAYER = 3840 * 10240 * 2  # bytes of the largest matrix of a Z-Image layer in bfloat16
SCORER_LAYER = 5120 * 13824 * 2  # of InternVL3-14B's language model


@pytest.fixture(scope="module")
def results():
    if not benchmark.RESULTS.exists():
        pytest.skip("there are no figures yet: python benchmarks/tpu_compile.py")
    return json.loads(benchmark.RESULTS.read_text())


def programs(results, *kinds):
    for case, reports in benchmark.of_kind(results, *kinds):
        for report in reports.values():
            for name, p in report["programs"].items():
                yield f"{case.name} {name}", report, p


def test_page_shows_the_results(results):
    shown = benchmark.PAGE.read_text().split(benchmark.BEGIN)[1].split(benchmark.END)[0]
    assert shown.strip() == benchmark.tables(results)


def test_results_are_of_all_cases_and_their_programs(results):
    """So the loops below miss none, once all are made."""
    expected = {(case.name, program) for case in benchmark.CASES for program in case.programs}
    found = {(name, program) for name, reports in results.items() for program in reports}
    assert found <= expected
    for case, reports in benchmark.of_kind(results, "run", "scaling"):
        assert all(name in report["programs"] for name, report in reports.items()), case.name
    if missing := sorted(expected - found):
        pytest.skip(f"figures still to be made by benchmarks/tpu_compile.py: {missing}")


def test_the_chosen_remat_is_the_fastest_that_fits(results):
    """Of the policy that keeps the next thing more each program is too large, or no faster."""
    assert set(benchmark.POLICIES) == {"none", *layers.REMAT_POLICIES}
    chosen = {(case.config, case.place): reports for case, reports in benchmark.of_kind(results, "run")}
    for case, reports in benchmark.of_kind(results, "remat"):
        for name, report in reports.items():
            (other,) = report["programs"].values() if report["programs"] else (None,)
            if other is None or other["peak"] > 0.85 * report["memory"]:
                continue
            ours = chosen[case.config, case.place][name]["programs"][name]
            assert benchmark.bound(other) >= 0.995 * benchmark.bound(ours), (case.name, name)


def test_each_chip_of_the_scaling_table_has_several_sizes():
    chip = lambda case: (case.config, case.topology.partition(":")[0])  # noqa: E731
    compared = {chip(case) for case in benchmark.CASES if case.kind == "scaling"}
    sizes = {key: set() for key in compared}
    for case in benchmark.CASES:
        if case.kind in ("run", "scaling") and chip(case) in compared and set(benchmark.SCALED) <= set(case.programs):
            sizes[chip(case)].add((case.topology, case.slices))
    assert compared and all(len(found) >= 2 for found in sizes.values()), sizes


def test_chosen_settings_fit_and_gather_one_layer_at_most(results):
    for name, report, p in programs(results, "run", "scaling"):
        assert p["peak"] <= 0.85 * report["memory"], name
        assert p["largest_gather"][0] <= (SCORER_LAYER if "student" in name else LAYER), (name, p["largest_gather"])
    for case, reports in benchmark.of_kind(results, "run", "scaling"):
        assert not [failure for report in reports.values() for failure in report["failures"]], case.name


def test_little_is_computed_twice(results):
    """Over the outer step, for each length of the unroll."""
    for case, reports in benchmark.of_kind(results, "run"):
        for length in ("/1", "/2"):
            made = {n: p for r in reports.values() for n, p in r["programs"].items() if n.endswith(length)}
            if len(made) < 2:
                continue  # told above
            executed, useful = (benchmark.total(made, lambda p, key=key: p[key]) for key in ("executed", "useful"))
            assert executed <= 1.30 * useful, (case.name, length)


def test_more_chips_need_no_more_memory(results):
    temporaries = {}
    for case, reports in benchmark.of_kind(results, "run", "scaling"):
        for name in benchmark.SCALED if case.config == "npedit" and case.slices == 1 else ():
            if name in reports:
                key = (case.topology.partition(":")[0], name)
                temporaries.setdefault(key, []).append(reports[name]["programs"][name]["temporaries"])
    for key, found in temporaries.items():
        assert max(found) <= 1.05 * min(found), (key, found)


def test_v5p_is_bound_by_its_products_and_the_denoiser_alone_is_small(results):
    for case, reports in benchmark.of_kind(results, "run"):
        made = {name: p for report in reports.values() for name, p in report["programs"].items()}
        if case.topology.startswith("v5p") and set(made) >= set(benchmark.PROGRAMS):
            seconds, useful = (benchmark.total(made, value) for value in (benchmark.bound, lambda p: p["useful"]))
            assert useful / seconds / next(iter(reports.values()))["peak_flops"] >= 0.55
    for _, reports in benchmark.of_kind(results, "forward"):
        for p in reports.values():
            assert p["peak"] <= 1.8 * benchmark.GIB
            assert p["executed"] <= 1.02 * p["useful"]  # no sample is computed by more than one chip
