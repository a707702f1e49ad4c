"""Conversions whose work is spread over eight devices, run by `test_devices.py` in a process that
has them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from atd.calibration import streams
from atd.calibration.memory import memory
from atd.calibration.streams import Calibration
from atd.checkpoint.folder import read_manifest
from atd.decomposition import error_feedback
from atd.errors import BadInput
from atd.models.random_model import SHAPES, random_graph
from atd.parallel.devices import MODEL, make_mesh
from atd.parallel.workers import on_each_device, spread_here, workers, working
from atd.pipeline.convert import convert
from atd.pipeline.recipe import read_recipe
from atd.study.run import run_study
from tests import stories
from tests.models.tiny import tiny_graph
from tests.parallel.small import one_layer

NO_CODE = ("decompose.trellis=", "decompose.refits=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return one_layer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(stories.text(8_000, 2))
    return file


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(streams, "BATCH", 96)


def with_devices(count: int, function: Callable):
    with working(make_mesh(1, count)):
        return function()


@pytest.mark.usefixtures("small_batches")
def test_moments_are_those_of_one_device():
    dense = tiny_graph()
    tokens = np.random.default_rng(0).integers(0, 40, (11, 32)).astype(np.int32)

    def moments() -> np.ndarray:
        calibration = Calibration(tokens)
        for unit in dense.units[:2]:
            calibration.begin(unit, unit)
            calibration.finish()
        calibration.begin(dense.units[2], dense.units[2])
        found = calibration.moments("model.layers.1.mlp.down_proj")
        return np.stack([found.hessian, found.cross])

    assert np.array_equal(with_devices(3, moments), moments())


def test_rows_are_those_of_one_device(monkeypatch):
    monkeypatch.setattr(error_feedback, "ROWS", 16)
    random = np.random.default_rng(0)
    weight, inputs = (random.standard_normal((n, 24)).astype(np.float32) for n in (90, 64))
    hessian = inputs.T @ inputs / 64
    factor = error_feedback.factor(hessian)

    def rows() -> list[np.ndarray]:
        return [*error_feedback.decompose(weight, factor, hessian, bases=1, group="row", tied=True)]

    for one, many in zip(rows(), with_devices(3, rows), strict=True):
        assert np.array_equal(one, many)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "devices"),
    [("ternary2", NO_CODE, 3), ("ternary2", (), 2), ("datafree2", (), 3)],
)
@pytest.mark.usefixtures("small_batches")
def test_bytes_are_those_of_one_device(model, text, tmp_path, recipe, overrides, devices):
    chosen = read_recipe(recipe, overrides)
    chosen = replace(chosen, calibration_tokens=512, calibration_context=32)

    def files(count: int) -> dict[str, str]:
        mesh = make_mesh(1, count)
        return read_manifest(
            convert(
                model,
                tmp_path / str(count),
                chosen,
                calib=text if chosen.pipeline.calibrated else (),
                ignore_extra=True,
                mesh=mesh,
                say=lambda line: None,
            )
        )

    assert files(devices) == files(1)


@pytest.mark.slow
def test_figures_of_a_study_are_those_of_one_device(model, text, tmp_path):
    def rows(devices: int) -> list[dict[str, str]]:
        study = tmp_path / str(devices)
        done, failed = run_study(
            model,
            study,
            ["datafree2"],
            data=[text],
            context=64,
            ignore_extra=True,
            mesh=make_mesh(1, devices),
            say=lambda line: None,
        )
        assert not failed
        return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in done]

    assert rows(3) == rows(1)


def test_tasks_run_on_all_devices_in_order():
    def task(item: int) -> tuple[int, object, np.ndarray]:
        (device,) = shared().devices()
        return item, device, np.asarray(shared() + item)

    with working(make_mesh(1, 4)):
        assert workers().count == 4
        shared = on_each_device(jax.numpy.ones(2))
        found = list(spread_here(task, range(10)))
    assert [item for item, *_ in found] == [*range(10)]
    assert [device for _, device, _ in found] == [jax.devices()[i % 4] for i in range(10)]
    assert all((array == 1 + item).all() for item, _, array in found)
    assert workers().count == 1


def test_a_mesh_whose_devices_share_a_model_is_refused(model, tmp_path):
    mesh = Mesh(np.asarray(jax.devices()), (MODEL,))
    with pytest.raises(BadInput, match="the axis 'model' of the mesh has 8 devices"):
        convert(model, tmp_path / "out", "datafree2", mesh=mesh)


def test_each_device_takes_memory():
    graph = random_graph(SHAPES["tiny"])
    one, two = (memory(graph, 4096, 512, devices) for devices in (1, 2))
    assert one.work < two.work < 2 * one.work
    assert one.streams == two.streams


def test_more_devices_than_there_are_is_refused(model, tmp_path, atd):
    code, _, said = atd("convert", model, tmp_path / "out", "--devices", 9)
    assert code == 2
    assert "9 devices were asked for, and this process has 8" in said
    assert not [*tmp_path.iterdir()]
