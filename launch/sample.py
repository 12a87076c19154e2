"""Draws samples from a finished run: a picture of all with their arrays beside it, or text.

python -m launch.sample --workdir=DIR [--n=100] [--steps=1] [--seed=0] [--role=student] \\
    [--out=FILE.png] [--adapters=FOLDER:WEIGHT,...]

With --adapters, a role with `lora` is drawn from with a weighted sum of adapters on its base: its
own, and those of the students of other runs on the same base. A weight that is left out is 1; the
folder "." is the run itself.
"""

from jaxdistill.core.types import Refused, lookup, nearest
from launch._command import arguments, main, needed, output, shares, whole

KNOWN = {
    "config": "",
    "workdir": "",
    "n": "100",
    "steps": "0",
    "seed": "0",
    "role": "student",
    "out": "",
    "adapters": "",
}


def sample(argv: list[str]) -> None:
    values, config = arguments(argv, KNOWN)
    config, workdir = needed(values, config)
    n = whole(values, "n", 1)
    steps = whole(values, "steps", 0)
    seed = whole(values, "seed", 0)
    given = output(values, "out", (".png",))
    weights = shares(values, "adapters", workdir)
    import dataclasses

    import jax
    import numpy as np

    from jaxdistill.core.net import paths
    from jaxdistill.evals.text import TextEval
    from jaxdistill.run import adapters, loop
    from jaxdistill.run.experiment import Experiment

    experiment = Experiment(config, workdir)
    role = values["role"]
    if experiment.evaluation is None:
        raise Refused(
            f"{workdir}: its config has no evaluation, which knows how to sample"
        )
    if role not in experiment.roles:
        raise Refused(f"--role={role}{nearest(role, experiment.roles)}")
    exports = experiment.method.exports
    merged = set(exports) if role in exports else {role}
    if weights:
        adapters.check(experiment, merged, weights)
    roles = experiment.with_bases([role, *exports])
    trained = loop.load(workdir, config, roles=roles)
    if weights:
        trained = adapters.summed(trained, merged, weights)
    evaluation = trained.experiment.evaluation
    evaluation = dataclasses.replace(evaluation, seed=seed)
    if isinstance(evaluation, TextEval):
        if given or steps:
            key = "out" if given else "steps"
            raise Refused(
                f"--{key}: goes with samples that are pictures; texts are printed"
            )
        for line in lookup(evaluation.texts(trained, n), role, "--role"):
            print(line, end="\n---\n")
        return
    evaluated = list(evaluation.models(trained.params))
    # role -> the first number of steps of its evaluation
    first = dict(reversed(evaluated))
    if role not in first and trained.experiment.described(role)[1] is None:
        raise Refused(f"--role={role}: is no denoiser{nearest(role, first)}")
    if role not in first and not steps:
        raise Refused(
            f"--steps=N is needed: the run's own evaluation does not draw from {role}"
        )
    steps = steps or first[role]
    # The held-out conditions, repeated where there are fewer than n.
    real = trained.experiment.data.evaluation(n)
    index = np.arange(n) % len(real["x"])
    real = jax.tree.map(lambda v: v[index], real)
    x, _ = evaluation.generate(trained, role, steps, real)
    kind = "_adapters" if weights else ""
    name = f"{role}_{steps}steps_seed{seed}{kind}.png"
    out = given or workdir / "samples" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    evaluation.picture(x, real).save(out)
    cond = {"cond": real["cond"]} if "cond" in real else {}
    arrays = out.with_suffix(".npz")
    np.savez(arrays, x=x, **paths(cond))
    print(
        f"{len(x)} samples of {role} at {evaluation.nfe(role, steps)} NFE: {out}, {arrays}"
    )


if __name__ == "__main__":
    main(sample)
