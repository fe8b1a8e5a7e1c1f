import logging

import jax
import pytest

from tokendance_jax.kernels import dispatch


def unfit(x):
    raise NotImplementedError(f"no heads of {x}")


def twice(x):
    return 2 * x


FOLD = dispatch.Op("fold", xla=twice, mosaic_gpu=unfit, mosaic_tpu=unfit)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    dispatch._report.cache_clear()
    yield
    dispatch._report.cache_clear()


def test_code_in_place_of_a_kernel_is_told_once_with_the_reason(on_a_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        assert [FOLD.run(None, lambda fold: fold(32)) for _ in range(3)] == [64] * 3
    (record,) = caplog.records
    assert record.getMessage() == "fold: XLA code in place of mosaic_gpu: no heads of 32"
    with caplog.at_level(logging.WARNING):
        FOLD.run(None, lambda fold: fold(48))
    assert "no heads of 48" in caplog.records[-1].getMessage()


def test_a_named_kernel_has_nothing_in_its_place(on_a_gpu, caplog):
    with pytest.raises(NotImplementedError, match="no heads of 32"):
        FOLD.run("mosaic_gpu", lambda fold: fold(32))
    assert not caplog.records


def test_xla_code_needs_no_word_on_a_cpu(caplog):
    assert FOLD.run(None, lambda fold: fold(32)) == 64
    assert not caplog.records
