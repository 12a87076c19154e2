"""scheduler_config.json of pipelines, without networks."""

import json

import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.interop import pipeline
from tests import damage

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
DDPM = {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
}


class VAE:
    class config:
        down = 8


@pytest.fixture
def times(tmp_path):
    """times(cls, config, steps): where the sampler asks, of a folder with this scheduler."""
    (tmp_path / "scheduler").mkdir()

    def run(cls, config, steps=4, size=(64, 64)):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(
            json.dumps(config)
        )
        found = cls(tmp_path, {}, {"vae": (VAE, {})})
        found.param  # noqa: B018 - SDXL's is read from the same file
        return found.times(steps, size)

    return run


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_times_fall_from_one(times, steps):
    for cls, config in (
        (pipeline.Sana, FLOW),
        (
            pipeline.Sana,
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "prediction_type": "flow_prediction",
                "flow_shift": 3.0,
            },
        ),
        (
            pipeline.Sana,
            {"_class_name": "UniPCMultistepScheduler", "flow_shift": None},
        ),
        (
            pipeline.QwenImage,
            FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        ),  # of one step too, where nothing is stretched
        (pipeline.StableDiffusionXL, DDPM),
    ):
        found = times(cls, config, steps)
        assert (
            found.shape == (steps,)
            and np.isclose(found[0], 1)
            and (np.diff(found) < 0).all()
            and found[-1] > 0
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("shift", value)
            for value in (
                0,
                -1.0,
                float("nan"),
                float("inf"),
                "3",
                None,
                True,
                [3.0],
                10**30,
            )
        ),
        *(("flow_shift", value) for value in (0, -3, "3")),
        *(
            ("shift_terminal", value)
            for value in (1, 1.5, -0.1, "0.02", float("nan"))
        ),
        *(("use_dynamic_shifting", value) for value in (1, "true", None)),
        *(("base_shift", value) for value in (None, float("inf"), 10**9)),
        *(("max_image_seq_len", value) for value in (256, 0, -5, 4096.0)),
        *(
            ("_class_name", value)
            for value in (
                "SCMScheduler",
                "DDIMScheduler",
                "FlowMatchEulerDiscreteSchedular",
                5,
                ["x"],
                "a\nb",
            )
        ),
        *(("prediction_type", value) for value in ("epsilon", "ghost", 7)),
    ],
)
def test_refuses_a_flow_without_falling_times(times, key, value):
    message = damage.outcome(
        lambda: times(pipeline.Sana, FLOW | {key: value}), "scheduler_config.json"
    )
    assert message and key in message, (key, value, message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("num_train_timesteps", value)
            for value in (0, -1000, 1000.0, "1000", 10**12, float("nan"), None)
        ),
        *(
            ("prediction_type", value)
            for value in ("sample", "flow_prediction", 5, ["epsilon"])
        ),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_refuses_a_diffusion_that_is_none(times, key, value):
    message = damage.outcome(
        lambda: times(pipeline.StableDiffusionXL, DDPM | {key: value}),
        "scheduler_config.json",
    )
    assert message and key in message, (key, value, message)


def test_refuses_counts_of_steps(times):
    for cls, config in ((pipeline.Sana, FLOW), (pipeline.StableDiffusionXL, DDPM)):
        for steps in (0, -3, 2.5, True):
            with pytest.raises(
                Refused, match=f"steps={steps}: expected a positive whole number"
            ):
                times(cls, config, steps)
    with pytest.raises(
        Refused, match=r"4 steps have the times .*expected falling ones in 0..1"
    ):
        times(pipeline.StableDiffusionXL, DDPM | {"num_train_timesteps": 2})


def test_a_near_name_is_suggested(times):
    with pytest.raises(
        Refused, match="did you mean 'FlowMatchEulerDiscreteScheduler'"
    ):
        times(
            pipeline.Sana, FLOW | {"_class_name": "FlowMatchEulerDiscreteSchedular"}
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": 5}, "text_encoder is 5, expected a library and a class"),
        (
            {"vae": "AutoencoderKLWan"},
            "vae is 'AutoencoderKLWan', expected a library and a class",
        ),
        ({"vae": None}, "vae is missing"),
        (
            {"boundary_ratio": None},
            "boundary_ratio=None is not supported, expected a number from 0 to 1",
        ),
        ({"boundary_ratio": "0.9"}, "boundary_ratio='0.9' is not supported"),
        ({"boundary_ratio": 900}, "boundary_ratio=900 is not supported"),
        (
            {"_class_name": ["WanPipeline"]},
            "_class_name=.* is not supported, expected text",
        ),
    ],
)
def test_refuses_an_index_of_a_pipeline_by_key(
    tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(pipeline.interop, "load", lambda folder, dtype: (VAE, {}))
    index = {
        name: ["diffusers", "x"]
        for name in ("text_encoder", "transformer", "transformer_2", "vae")
    }
    index |= {"_class_name": "WanPipeline", "boundary_ratio": 0.9}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert set(pipeline.load(tmp_path).parts) == set(index) - {
        "_class_name",
        "boundary_ratio",
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(Refused, match=f"model_index.json: .*{message}"):
        pipeline.load(tmp_path)


def test_refuses_tokens_that_the_encoder_has_no_words_for(tmp_path):
    class Net:
        class config:
            vocab = 5

        def apply(self, params, tokens, method):
            return tokens

    found = pipeline.Sana(tmp_path, {}, {"text_encoder": (Net(), {})})
    assert (
        np.asarray(found.run("text_encoder", np.arange(5, dtype=np.int32)))
        == np.arange(5)
    ).all()
    with pytest.raises(
        Refused,
        match="a tokenizer gives token 5, expected one below 5, the words of text_encoder",
    ):
        found.run("text_encoder", np.arange(6, dtype=np.int32))
