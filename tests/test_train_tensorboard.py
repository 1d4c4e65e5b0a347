"""TensorBoard's events, read back from the file: length, checksum, event, checksum."""

import json
import struct

import pytest
from helpers import small_config
from tensorboardX.proto.event_pb2 import Event

from scaling_jax.train.loop import train
from scaling_jax.train.metrics import MetricsWriter, read_records

STEP = 128  # tokens


def events(workdir):
    """Of all files, the oldest first."""
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: int(path.name.rpartition(".")[2])):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def values(workdir, kind):
    return [(e.step, v.tag, v) for e in events(workdir) for v in e.summary.value if v.HasField(kind)]


def draw(workdir, name, red):
    from matplotlib.image import imsave

    path = workdir / f"{name}.png"
    imsave(path, [[[red, 0.0, 0.0]] * 7] * 3)
    return path


@pytest.mark.usefixtures("quick_compilation")
def test_figures_are_images_at_the_last_step_of_every_start(tmp_path):
    calls = []

    def report(summary):
        assert json.loads((tmp_path / "summary.json").read_text()) == summary
        calls.append(summary["steps"])
        return [draw(tmp_path, "loss", len(calls) / 4), draw(tmp_path, "noise_scale", len(calls) / 4)]

    pngs = []
    for stop in (12, 0, 0):  # the last time it is finished already
        config = small_config(model__depth=1, noise_scale__every=0, logging__tensorboard=True, train__stop_at_tokens=stop * STEP)
        train(config, tmp_path, report=report)
        pngs += [(tmp_path / f"{name}.png").read_bytes() for name in ("loss", "noise_scale")]
    assert calls == [12, 20, 20]
    images = values(tmp_path, "image")
    assert [(step, tag) for step, tag, _ in images] == [(step, f"figures/{name}") for step in (12, 20) for name in ("loss", "noise_scale")]
    assert [v.image.encoded_image_string for _, _, v in images] == pngs[:4]
    assert all((v.image.width, v.image.height) == (7, 3) for _, _, v in images)
    scalars = [(step, v.simple_value) for step, tag, v in values(tmp_path, "simple_value") if tag == "loss"]
    assert scalars == [(r["step"], pytest.approx(r["loss"])) for r in read_records(tmp_path) if "loss" in r]
    # TensorBoard hides all from a later START on: nothing of the first start.
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [1, 13]


def test_lists_are_numbered_and_what_is_unknown_is_left_out(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write({"step": 3, "tokens": 64, "loss": None, "event": "not finite", "grad_sq/layers": [0.5, None, 2.0]})
    writer.close()
    written = [(step, tag, v.simple_value) for step, tag, v in values(tmp_path, "simple_value")]
    assert written == [(3, "tokens", 64.0), (3, "grad_sq/layers/00", 0.5), (3, "grad_sq/layers/02", 2.0)]
