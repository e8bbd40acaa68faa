"""What training rests on: marked close-ups, what the decoder is punished for, the feed, the archive."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn

from accdiff_lib.standalone.loading import load
from testbed import decoder, gpu, vae
from testbed.captions import caption
from testbed.decoder import decoder_loss
from testbed.feed import Feed
from testbed.scenes import FULL, Scene, Thing, View, cut, held_out, render

BALL = Thing("red", "ball", 0.5, 0.6, 0.15)
SCENE = Scene((BALL,), "snow", "night", 0.5)


@pytest.mark.parametrize("view, expected", [(FULL, False), (View(0.3, 0.3, 0.8, 0.8), False),
                                            (View(0.3, 0.45, 0.8, 0.95), True), (View(0.0, 0.0, 0.5, 0.5), True),
                                            (View(0.0, 0.7, 0.3, 1.0), False)])
def test_a_view_cuts_a_thing(view, expected):
    assert cut(SCENE, view) == expected


def test_where_a_thing_is_cut_most_captions_say_so():
    rng = np.random.default_rng(0)
    marked = ["close-up" in caption(SCENE, View(0.2, 0.45, 0.9, 1.15), rng) for _ in range(100)]
    assert 85 <= sum(marked) < 100
    assert not any("close-up" in caption(SCENE, FULL, rng) for _ in range(20))


def test_the_decoder_is_punished_for_wrong_things_and_for_lost_detail():
    image = torch.from_numpy(render(SCENE, 256, 256)).permute(2, 0, 1)[None].float() / 127.5 - 1
    spot = torch.zeros_like(image)
    spot[..., 146:160, 122:136] = 0.3
    elsewhere = spot.roll(80, -2)
    assert decoder_loss(image, image) == 0
    assert decoder_loss(image + spot, image) > 2 * decoder_loss(image + elsewhere, image)
    blurred = nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
    twice = 2 * image - blurred
    assert decoder_loss(blurred, image) > decoder_loss(image + (blurred - image) / 2, image) > 0
    assert decoder_loss(twice, image) > 0


def test_fine_detail_needs_its_strength_only_where_it_is_asked_for():
    image = torch.from_numpy(render(SCENE, 256, 256)).permute(2, 0, 1)[None].float() / 127.5 - 1
    soft = (image + nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False)) / 2
    losses = [float(decoder_loss(soft, image, strength)) for strength in (0, 1, 2)]
    assert 0 < losses[0] < losses[1] and losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)


def test_close_views_are_of_the_world_and_mostly_at_rims():
    rng = np.random.default_rng(0)
    views = [decoder.close(rng, SCENE) for _ in range(200)]
    sides = [view.bottom - view.top for view in views]
    assert all(view.top >= 0 and view.left >= 0 and view.bottom <= 1 and view.right <= 1 for view in views)
    assert all(view.right - view.left == pytest.approx(side) and 0.25 <= side <= 1
               for view, side in zip(views, sides, strict=True))
    assert {0.25, 0.5, 1.0} < set(sides)
    quarters = [view for view in views if view.bottom - view.top == 0.25]
    assert 0.5 < np.mean([cut(SCENE, view) for view in quarters]) < 1


def test_pictures_of_a_step_are_the_same_again_and_not_held_out(monkeypatch):
    seen = []
    monkeypatch.setattr(decoder, "held_out", lambda scene: seen.append(held_out(scene)) or seen[-1])
    first = decoder.pictures(11)
    assert first.shape == (1, 3, 384, 384) and decoder.pictures(12).shape == (2, 3, 256, 256)
    assert torch.equal(first, decoder.pictures(11)) and not torch.equal(decoder.pictures(12), decoder.pictures(13))
    assert -1 <= first.min() < first.max() <= 1
    for step in range(20, 40):
        decoder.pictures(step)
    assert 0 < sum(seen) < len(seen) / 4


def test_the_decoder_is_trained_alone_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "SIDE", 64)
    monkeypatch.setattr(decoder, "LARGE", 64)
    monkeypatch.setattr(vae, "quality", lambda model: 30.0)

    monkeypatch.setattr("signal.signal", lambda *_: None)

    def train(run: str) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("sys.argv", ["decoder", "--run", str(tmp_path / run), "--steps", "4", "--out",
                                         str(tmp_path / "model")])
        decoder.main()
        return load(tmp_path / "model").vae.state_dict()

    before, after = load(None).vae.state_dict(), train("whole")
    changed = {name.partition(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder", "post_quant_conv"}

    def stop_at_two(step: int) -> torch.Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return pictures(step)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        pictures = decoder.pictures
        context.setattr(decoder, "pictures", stop_at_two)
        train("stopped")
    assert all(torch.equal(value, after[name]) for name, value in train("stopped").items())


def test_the_feed_gives_back_what_it_lent():
    feed = Feed(1, size=1, waiting=2)
    try:
        seen = [block.tokens.copy() for _ in range(3) for block in islice(feed.ready(wait=True), 1)]
    finally:
        feed.stop()
    assert len(seen) == 3 and not np.array_equal(seen[0], seen[1])


def test_a_trainer_ends_with_the_averaged_weights(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(2, 1)
    store = type("Full", (), {"count": 0, "refill": lambda self: None})()
    trainer = gpu.Trainer([(module, 0.1)], lambda: {"loss": module(torch.ones(1, 2)).square().mean()}, 0.9)
    halves = []
    clock = gpu.Clock(tmp_path)
    trainer.train(clock.seconds + 0.3, clock, store, "test", lambda: halves.append(module.weight.detach().clone()))
    last = module.weight.detach().clone()
    trainer.keep_average()
    assert len(halves) == 1 and trainer.steps > 1
    assert not torch.equal(module.weight, last) and torch.allclose(module.weight, last, atol=0.05)


def test_the_archive_is_the_model(tmp_path):
    models = load(None)
    gpu.write(models, tmp_path, "half")
    gpu.write(replace(models), tmp_path, "final")
    assert {file.name for file in tmp_path.iterdir()} == {"model-final.tar.0", "model-final.tar.1"}
    gpu.unpack(tmp_path, tmp_path / "model")
    again = load(tmp_path / "model", controlnet=tmp_path / "model" / "controlnet")
    for ours, theirs in zip(again.modules(), models.modules(), strict=True):
        states = ours.state_dict(), theirs.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
