"""The table of coverage, its parts and the page that is written from it."""

import re
from pathlib import Path

import pytest

from experiments import coverage
from experiments.coverage import PARTS, is_known, origin, store
from experiments.coverage_networks import FAMILIES, NAMES, Network, networks
from experiments.coverage_report import report
from experiments.tables import read_table, write_table

TRACED = {"groups": "2", "reasons": "1 x is the network's input"}
RESNET18 = Network("torchvision", "resnet18")


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "coverage.csv"
    monkeypatch.setattr(coverage, "TABLE", path)
    return path


def test_each_part_leaves_the_columns_of_the_others(table):
    measured = {
        "autoprune": {"groups": "12", "measured": "2026-01-02 10:00"},
        "onnx": {"onnx_error": "1e-7", "onnx_measured": "2026-01-03 10:00"},
        "torch-pruning": {"tp_runs": "yes", "tp_measured": "2026-01-04 10:00"},
    }
    wanted = {}
    for part in PARTS:
        store(RESNET18, part, measured[part])
        wanted |= measured[part]
        [row] = read_table(table)
        assert wanted.items() <= row.items()


def test_measuring_again_clears_what_that_part_alone_had_found(table):
    store(RESNET18, "onnx", {"onnx_failure": "too new", "onnx_measured": "2026-01-02"})
    store(RESNET18, "autoprune", {"failures": "costs", "measured": "2026-01-02"})
    store(RESNET18, "autoprune", {"groups": "12", "measured": "2026-01-03"})
    [row] = read_table(table)
    assert row["failures"] == ""
    assert row["onnx_failure"] == "too new"


@pytest.mark.parametrize("part", PARTS)
def test_row_from_before_a_time_does_not_count(table, part):
    assert not is_known(RESNET18, part)
    store(RESNET18, part, {PARTS[part].measured: "2026-01-02 10:00"})
    assert is_known(RESNET18, part)
    assert is_known(RESNET18, part, "2026-01-02 10:00")
    assert not is_known(RESNET18, part, "2026-01-02 10:01")


def test_what_is_measured_now_is_newer_than_what_was_measured_on_a_past_day():
    assert origin("onnx")["onnx_measured"] > "2026-01-01"


def test_page_tells_what_was_measured_when(table):
    old = TRACED | {"measured": "2026-01-02 10:00"}
    store(RESNET18, "autoprune", old)
    store(Network("timm", "dla34"), "autoprune", old)
    store(Network("timm", "lcnet_050"), "autoprune", old | {"measured": "2026-02-03"})
    page = report(read_table(table))
    assert "Of an earlier tracer, in timm: dla34." in page
    assert "Of an earlier tracer, in torchvision: all." in page
    [missing] = re.findall("Not measured yet, in timm: (.*)\\.", page)
    assert set(missing.split(", ")) == set(NAMES["timm"]()) - {"dla34", "lcnet_050"}
    assert "| timm | 1 on 2026-01-02, 1 on 2026-02-03 | 2 not yet | 2 not yet |" in page


def test_page_gives_a_refused_network_its_reason(table):
    reason = "trace: UserError: it depends on the values of activations"
    network = Network("detection", "ssd300_vgg16")
    store(network, "autoprune", {"failures": reason, "measured": "2026-01-02 10:00"})
    page = report(read_table(table))
    assert f"| ssd300_vgg16 | fails | {reason} |" in page
    assert "| detection | 1 | 0 | 0 |" in page


def test_checks_that_were_not_made_are_not_counted(table):
    store(RESNET18, "autoprune", TRACED | {"measured": "2026-01-02"})
    vgg = Network("torchvision", "vgg11")
    store(vgg, "autoprune", TRACED | {"measured": "2026-01-02"})
    store(vgg, "onnx", {"onnx_error": "1e-7", "onnx_measured": "2026-01-02"})
    page = report(read_table(table))
    [line] = [
        line for line in page.splitlines() if line.startswith("| torchvision | 2 |")
    ]
    assert "| 1 of 1 |" in line


def test_page_tells_a_failed_export_of_a_network_that_was_not_traced_yet(table):
    store(RESNET18, "onnx", {"onnx_failure": "why", "onnx_measured": "2026-01-02"})
    assert "| resnet18 | ONNX | why |" in report(read_table(table))


def test_page_is_that_of_the_table_and_every_row_is_of_a_known_network():
    rows = read_table(coverage.TABLE)
    assert coverage.DOCUMENT.read_text(encoding="utf-8") == report(rows)
    known = {(network.family, network.name) for network in networks()}
    assert {(row["family"], row["builder"]) for row in rows} <= known


def test_families_have_the_networks_that_users_ask_for():
    assert set(NAMES) == set(FAMILIES)
    assert len(NAMES["timm"]()) >= 60
    wanted = {"vit", "swin", "segformer", "detr", "dinov2"}
    assert wanted <= set(NAMES["transformers"]())


def test_table_keeps_its_columns(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, read_table(coverage.TABLE), coverage.FIELDS)
    assert path.read_text() == coverage.TABLE.read_text()
