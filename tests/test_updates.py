"""The updates of a run: their shares among the processes, and the image size of each."""

import math

import pytest

from raftmlp.data.updates import Share, SizeSettings, Updates, share_batches
from raftmlp.errors import MissingPackageError, UserError

SIZES = [(24, 24), (32, 32), (40, 48)]


@pytest.mark.parametrize(
    "batch_size, total, world_size, expected",
    [
        (128, None, 2, (128, 1)),
        (256, 2048, 8, (256, 1)),
        (128, 2048, 8, (128, 2)),
        (100, 2048, 8, (64, 4)),
        (10**11, None, 1, (10**11, 1)),
    ],
)
def test_the_global_batch_is_kept(batch_size, total, world_size, expected):
    share = share_batches(batch_size, total, world_size=world_size)
    assert (share.batch_size, share.steps) == expected
    assert share.images == (total or batch_size * world_size) == math.prod(expected) * world_size


def test_a_global_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="--global-batch-size 2048 cannot be shared among 3 processes"):
        share_batches(128, 2048, world_size=3)


def make_updates(images=400, batch_sizes=(4, 4, 4), **given) -> Updates:
    return Updates(images, SIZES, [Share(n) for n in batch_sizes], **given)


def choices(updates: Updates, epoch: int) -> list[int]:
    return [updates.choice(epoch, update) for update in range(updates.per_epoch)]


def test_the_size_of_an_update_is_a_function_of_seed_epoch_and_update():
    one, other = make_updates(seed=3), make_updates(seed=3)
    drawn = choices(one, epoch=2)
    assert len(drawn) == 100 and set(drawn) == {0, 1, 2}
    assert other.choice(2, 57) == drawn[57]  # asked for it alone
    choices(other, epoch=5)
    assert choices(other, epoch=2) == drawn  # whatever was asked before
    assert choices(make_updates(seed=4), epoch=2) != drawn != choices(one, epoch=3)
    halves = Updates(400, SIZES, [Share(2, rank=1, world_size=2)] * 3, seed=3)  # the second of two processes
    assert choices(halves, epoch=2) == drawn


def test_sizes_come_as_often_as_their_probabilities_say():
    counts = make_updates(images=8000, probs=(3, 0, 1)).counts(epoch=0)
    assert list(counts) == ["24", "32", "40x48"] and sum(counts.values()) == 2000
    assert counts["32"] == 0 and counts["24"] / 2000 == pytest.approx(0.75, abs=0.05)


def test_a_progressive_schedule_goes_from_the_first_size_to_the_last():
    updates = make_updates(images=4000, schedule="progressive", epochs=5)
    most = [max(counts, key=counts.get) for counts in map(updates.counts, range(5))]
    assert (most[0], most[2], most[4]) == ("24", "32", "40x48")
    assert updates.counts(0)["40x48"] > 0  # now and then


def test_every_epoch_has_as_many_updates_where_their_images_change():
    updates = make_updates(images=1000, batch_sizes=(40, 20, 10), probs=(1, 2, 1))
    assert updates.average_images == pytest.approx(22.5) and updates.per_epoch == 44
    assert [sum(updates.counts(epoch).values()) for epoch in range(3)] == [44] * 3
    drawn = choices(updates, 1)
    assert updates.mean_images(1) == pytest.approx(sum((40, 20, 10)[choice] for choice in drawn) / 44)
    assert [updates.share(1, i).batch_size for i in range(44)] == [(40, 20, 10)[choice] for choice in drawn]


def test_one_size_needs_no_schedule(monkeypatch):
    monkeypatch.delattr("timm.data.ScheduledBatchSampler")  # as in an older timm
    updates = Updates(10, SIZES[:1], [Share(3)])
    assert (updates.per_epoch, choices(updates, 1), updates.mean_images(1)) == (3, [0, 0, 0], 3)
    with pytest.raises(MissingPackageError, match="--train-img-sizes needs a newer timm: pip install 'timm>="):
        choices(make_updates(), 0)


def test_sizes_in_any_notation():
    assert SizeSettings(train_img_sizes=(24, "32x32", "40x48")).train_img_sizes == ["24", "32", "40x48"]


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(sizes=[]), "train_img_sizes"),
        (dict(sizes=[24, 0]), "'0' must be a number of pixels or HEIGHTxWIDTH"),
        (dict(sizes=["24x"]), "'24x' must be a number of pixels or HEIGHTxWIDTH"),
        (dict(sizes=[24, 32, "24x24"]), "--train-img-sizes must differ, not 24 32 24"),
        (
            dict(batch_sizes=[8]),
            "--train-batch-sizes takes a number for each of the 2 --train-img-sizes 24 32, not 1: 8",
        ),
        (dict(batch_sizes=[8, 0]), "train_batch_sizes .* not 0"),
        (dict(probs=[1, 1, 2]), "--train-size-probs takes a number for each of the 2 .* 24 32, not 3: "),
        (dict(probs=[1, -0.5]), "train_size_probs .* not -0.5"),
        (dict(probs=[1, math.nan]), "train_size_probs .* not nan"),
        (dict(probs=[0, 0.0]), "--train-size-probs must add up to a number above 0, not 0"),
        (dict(probs=[1e308, 1e308]), "--train-size-probs must add up to a number above 0, not 1e"),
        (dict(schedule="slow"), "train_size_schedule .* not 'slow'"),
        (dict(sizes=[24], schedule="progressive"), "takes two --train-img-sizes or more, not 24 alone"),
    ],
)
def test_settings_that_cannot_be(given, message):
    given = {"sizes": [24, 32], **given}
    names = dict(sizes="train_img_sizes", batch_sizes="train_batch_sizes", probs="train_size_probs")
    with pytest.raises(UserError, match=message):
        SizeSettings(**{names.get(key, f"train_size_{key}"): value for key, value in given.items()})
