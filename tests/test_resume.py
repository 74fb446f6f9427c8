"""What decides whether a run may be resumed from a checkpoint."""

import pytest

from raftmlp.train.resume import changed_options, reason_not_to_resume
from raftmlp.train.settings import TrainSettings, make_recipe

SIZES = dict(train_img_sizes=[24, 32], train_size_schedule="progressive")
RECIPE = make_recipe(TrainSettings(epochs=3, global_batch_size=8))
CHECKPOINT = dict(optimizer={}, options=RECIPE, epoch=2, update=1, updates_per_epoch=5)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        (dict(options={**RECIPE, "lr": 1, "epochs": 9}), ""),
        (dict(options={}, update=0), ""),  # of a version that did not say them
        (dict(options={**RECIPE, "global_batch_size": 4}, update=0), ""),
        (dict(epoch=3, update=0), ""),
        (dict(options={**RECIPE, "opt": "sgd"}), "is of a run with --opt sgd, not adamw"),
        (dict(options={**RECIPE, "model_ema": True}), "is of a run with --model-ema True, not False"),
        (dict(options={**RECIPE, "global_batch_size": 4}), "middle of an epoch with --global-batch-size 4"),
        (dict(options={**RECIPE, "seed": 1}), "middle of an epoch with --seed 1"),
        (dict(updates_per_epoch=6), "middle of an epoch of 6 updates, of which this data makes 5"),
        (
            dict(options={**RECIPE, "train_img_sizes": ["24", "32"]}),
            "with --train-img-sizes 24 32: None cannot continue",
        ),
        (dict(options={**RECIPE, "train_img_sizes": ["24", "32"]}, update=0), ""),
        (dict(options={key: value for key, value in RECIPE.items() if "train_" not in key}), ""),  # of before them
        (dict(epoch=3), "is of epoch 4, --epochs says 3"),
    ],
)
def test_reason_not_to_resume(changes, reason):
    given = reason_not_to_resume({**CHECKPOINT, **changes}, RECIPE, updates_per_epoch=5)
    assert reason in given and bool(reason) == bool(given)


def test_a_progressive_schedule_depends_on_the_epochs():
    recipe = make_recipe(TrainSettings(epochs=3, global_batch_size=8, **SIZES))
    before = dict(optimizer={}, options={**recipe, "epochs": 9}, epoch=1, updates_per_epoch=5)
    assert "with --epochs 9: 3 cannot continue" in reason_not_to_resume({**before, "update": 1}, recipe, 5)
    assert reason_not_to_resume({**before, "update": 0}, recipe, 5) == ""
    before["options"] = {key: value for key, value in recipe.items() if not key.startswith("train_size")}
    reason = reason_not_to_resume({**before, "update": 1}, recipe, 5)
    assert "with --train-size-schedule constant: progressive cannot continue" in reason


def test_batch_sizes_count_where_they_say_how_many_images_an_update_has():
    sizes = dict(train_img_sizes=[24, 32], train_batch_sizes=[8, 4])
    for total, reason in ((None, "with --train-batch-sizes 9 4: 8 4 cannot continue"), (8, "")):
        recipe = make_recipe(TrainSettings(epochs=3, global_batch_size=total, **sizes))
        before = dict(optimizer={}, options={**recipe, "train_batch_sizes": [9, 4]}, update=1, updates_per_epoch=5)
        given = reason_not_to_resume(before, recipe, 5)
        assert reason in given and bool(reason) == bool(given)


@pytest.mark.parametrize(
    "before, now, reason",
    [
        (["cat", "dog"], ["cat", "dog"], ""),
        (("cat", "dog"), ["cat", "dog"], ""),
        (None, ["cat", "dog"], ""),  # of a version, or of data, without names
        (["cat", "dog"], None, ""),
        (["cat", "dog"], ["dog", "zebra"], "class 0 is 'cat'; it is 'dog'"),
        (["cat", "dog"], ["cat", "hound"], "class 1 is 'dog'; it is 'hound'"),
    ],
)
def test_the_names_of_the_classes(before, now, reason):
    checkpoint = {**CHECKPOINT, "pretrained_cfg": dict(label_names=before)}
    given = reason_not_to_resume(checkpoint, RECIPE, 5, now)
    assert reason in given and bool(reason) == bool(given)


def test_weights_alone_cannot_be_resumed_from():
    assert "holds weights only: --checkpoint" in reason_not_to_resume(dict(state_dict={}), RECIPE, 5)


def test_changed_options():
    before = {**RECIPE, "lr": 0.5, "of_another_version": 1}
    assert changed_options(before, {**RECIPE, "new_option": 1}) == ["lr 0.5 -> 0.001"]
    assert changed_options(RECIPE, RECIPE) == []
