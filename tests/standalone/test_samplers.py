"""k-diffusion's samplers and the schedules, on a denoiser whose answer is known."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from accdiff_lib.errors import InputError
from accdiff_lib.parts.noise_levels import NoiseLevels
from accdiff_lib.parts.step_noise import brownian_noise
from accdiff_lib.standalone import samplers
from accdiff_lib.standalone.loading import alphas_cumprod
from accdiff_lib.standalone.samplers import SAMPLERS, SCHEDULERS, KSolver, find_sampler, schedule, solver
from tests import golden

LEVELS = NoiseLevels(alphas_cumprod({}))
MEAN, DEVIATION = 0.7, 0.5
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.noise != "none"]


def gaussian(x, sigma):
    """The exact denoiser of data that is N(MEAN, DEVIATION^2)."""
    variance = sigma.view(-1, 1, 1, 1) ** 2
    return (x * DEVIATION**2 + MEAN * variance) / (DEVIATION**2 + variance)


def consistent(x, sigma):
    """Where the probability flow takes x: what a consistency model (LCM) predicts of that data."""
    return MEAN + (x - MEAN) * DEVIATION / (DEVIATION**2 + sigma.view(-1, 1, 1, 1) ** 2) ** 0.5


def start(sigmas, shape=(1, 4, 24, 24)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return MEAN + x * (DEVIATION**2 + sigmas[0] ** 2) ** 0.5


@pytest.mark.parametrize(("sampler", "scheduler"), product(SAMPLERS, SCHEDULERS))
def test_samples_the_known_distribution(sampler, scheduler):
    model = consistent if sampler == "LCM" else gaussian
    for steps in (1, 2, 5, 20):
        k = solver(sampler, scheduler, steps, LEVELS)
        result = k.integrate(model, start(k.sigmas), k.sigmas, 1)
        assert result.isfinite().all()
    k = solver(sampler, scheduler, 200, LEVELS)
    x = start(k.sigmas)
    result = k.integrate(model, x.clone(), k.sigmas, 1)
    assert abs(float(result.mean()) - MEAN) < 0.06
    assert abs(float(result.std()) - DEVIATION) < 0.06
    if sampler not in STOCHASTIC:  # the solution of the probability flow
        expected = MEAN + (x - MEAN) * DEVIATION / (DEVIATION**2 + k.sigmas[0] ** 2) ** 0.5
        assert (result - expected).abs().max() < 0.05


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50, 333, 999, 1000])
def test_schedules_fall_to_zero(scheduler, steps):
    sigmas = schedule(scheduler, steps, LEVELS)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    assert (sigmas[:-1] > sigmas[1:]).all()
    assert sigmas[0] <= np.float32(LEVELS.sigma_max)
    assert sigmas[-2] >= np.float32(LEVELS.sigma_min) * 0.99999
    if steps > 1 and scheduler in ("Normal", "Karras", "Exponential"):
        assert [float(sigmas[0]), float(sigmas[-2])] == pytest.approx([LEVELS.sigma_max, LEVELS.sigma_min], rel=1e-6)


def test_schedules_equal_k_diffusions():
    k = samplers._sampling
    ends = {"sigma_min": LEVELS.sigma_min, "sigma_max": LEVELS.sigma_max}
    torch.testing.assert_close(schedule("Karras", 20, LEVELS), k.get_sigmas_karras(20, **ends), rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule("Exponential", 20, LEVELS), k.get_sigmas_exponential(20, **ends), rtol=1e-5,
                               atol=0)
    simple = schedule("Simple", 30, LEVELS)[:-1].double().numpy()
    expected = [LEVELS.sigmas[-(1 + int(i * (1000 / 30)))] for i in range(30)]
    np.testing.assert_allclose(simple, expected, rtol=1e-6)


def test_leading_is_the_references_schedule():
    case = golden.Case(next(path for path in golden.case_folders() if path.name == "v2_abl_shuffle"))
    sigmas = schedule("Leading", 4, LEVELS)
    torch.testing.assert_close(sigmas, case.get("stage1|sigmas"), rtol=2e-6, atol=0)
    assert [LEVELS.timestep(float(sigma)) for sigma in sigmas[:-1]] == case.get("stage1|timesteps").tolist()


def test_timesteps_are_exact_integers_and_fractions():
    for t in range(1000):
        assert LEVELS.timestep(float(np.float32(LEVELS.sigmas[t]))) == t
    for t in (0.25, 13.5, 998.75):
        assert LEVELS.timestep(float(LEVELS.sigma(t))) == pytest.approx(t, abs=1e-6)
    assert LEVELS.timestep(0.0) == 0
    assert LEVELS.timestep(100.0) == 999
    zero_snr = NoiseLevels(torch.linspace(0.999, 0, 1000, dtype=torch.float64))
    assert np.isfinite(zero_snr.sigmas).all()


@pytest.mark.parametrize(("written", "meant"), [
    ("euler a", "Euler a"), ("DPM++ 2m", "DPM++ 2M"), ("dpmpp_2m", "DPM++ 2M"), ("dpm_2_ancestral", "DPM2 a"),
    (" DPM++  3M SDE ", "DPM++ 3M SDE"), ("euler_ancestral", "Euler a"), ("LMS", "LMS")])
def test_names(written, meant):
    assert find_sampler(written).name == meant
    assert KSolver(written, torch.tensor([1.0, 0.0])).name == meant


def test_errors_say_what_is_allowed():
    with pytest.raises(InputError, match=r"PLMS.*Euler a.*DPM\+\+ 3M SDE"):
        solver("PLMS", "Karras", 20, LEVELS)
    with pytest.raises(InputError, match=r"Beta.*Leading.*Simple"):
        solver("Euler", "Beta", 20, LEVELS)
    for steps in (0, 1001, -3):
        with pytest.raises(InputError, match="between 1 and 1000"):
            schedule("Karras", steps, LEVELS)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_returns_the_prediction(sampler):
    k = solver(sampler, "Karras", 20, LEVELS)
    x = start(k.sigmas[-2:])
    result = k.integrate(gaussian, x.clone(), k.sigmas[-2:], 1)
    torch.testing.assert_close(result, gaussian(x, k.sigmas[-2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", STOCHASTIC)
@pytest.mark.parametrize("scheduler", ["Karras", "Leading"])
def test_noise_does_not_depend_on_the_start(sampler, scheduler):
    k = solver(sampler, scheduler, 12, LEVELS)
    shape = (1, 2, 4, 4)

    def added(first, seed=5):
        """What the sampler adds to a latent whose prediction is the latent itself: its noise alone."""
        states = {}
        tail = k.sigmas[first:]
        end = k.integrate(lambda x, _: x, torch.zeros(shape), tail, seed, lambda d: states.update({d["i"]: d["x"]}))
        states[len(tail) - 1] = end
        return {first + i + 1: states[i + 1] - states[i] for i in range(len(tail) - 1)}

    whole = added(0)
    assert float(torch.stack([whole[i] for i in range(1, 12)]).std()) > 0.01
    if "M SDE" not in sampler:  # multi-step solvers also carry their history
        for i, noise in added(7).items():
            torch.testing.assert_close(noise, whole[i], rtol=1e-4, atol=1e-4)
    assert (added(0, seed=6)[3] - whole[3]).abs().max() > 1e-3


@pytest.mark.parametrize("scheduler", ["Karras", "Leading"])
def test_brownian_increments(scheduler):
    """Of a tail they are the same; of two half steps they add up; of different steps they are independent."""
    k = solver("DPM++ SDE", scheduler, 10, LEVELS)
    x = torch.zeros(1, 4, 64, 64)
    noise, sigmas = brownian_noise(x, k.sigmas, 3, k.name), k.sigmas
    for i in range(9):
        high, low = sigmas[i], sigmas[i + 1]
        middle = (high.log() / 2 + low.log() / 2).exp()
        whole, first, second = noise(high, low), noise(high, middle), noise(middle, low)
        total = first * (high - middle).sqrt() + second * (middle - low).sqrt()
        torch.testing.assert_close(whole * (high - low).sqrt(), total, rtol=0, atol=1e-4)
        assert float(whole.std()) == pytest.approx(1, abs=0.03)
        assert abs(float((first * second).mean())) < 0.04
        torch.testing.assert_close(brownian_noise(x, k.sigmas, 3, k.name)(high, low), whole, rtol=0, atol=0)
    assert abs(float((noise(sigmas[2], sigmas[3]) * noise(sigmas[3], sigmas[4])).mean())) < 0.04


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gives_the_model_its_own_latent_and_leaves_the_random_state(sampler):
    k = solver(sampler, "Karras", 6, LEVELS)
    seen, steps = [], []

    def model(x, sigma):
        seen.append(x)
        assert sigma.shape == (1,)
        return gaussian(x, sigma)

    x = torch.zeros(1, 1, 1, 1)
    before = torch.get_rng_state()
    k.integrate(model, x, k.sigmas, 1, lambda d: steps.append((d["i"], len(seen), d["x"] is seen[-1])))
    assert torch.equal(torch.get_rng_state(), before)
    assert seen[0] is x
    assert [i for i, _, _ in steps] == list(range(6))
    assert all(own for _, _, own in steps)
    assert steps[0][1] == 1  # after the step's first model call


def test_rewriting_the_latent_in_place_reaches_the_sampler():
    k = solver("Euler", "Karras", 4, LEVELS)

    def model(x, sigma):
        x.fill_(2.0)
        return x.clone()

    assert torch.equal(k.integrate(model, torch.zeros(1, 1, 2, 2), k.sigmas, 1), torch.full((1, 1, 2, 2), 2.0))


_IMPORT = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clip", "wandb", "cleanfid", "clean_fid"):
            raise ImportError(name)
        if name.split(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
sys.meta_path.insert(0, Broken())
{before}
from accdiff_lib.standalone import samplers
assert callable(samplers._sampling.sample_dpmpp_3m_sde)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("k_diffusion", "torchvision")))
{after}
"""


@pytest.mark.parametrize(("before", "after", "left"), [
    ("", "", []),
    ("import types; own = sys.modules['torchvision'] = types.ModuleType('torchvision')",
     "assert sys.modules['torchvision'] is own", ["torchvision"]),
    # A WebUI has imported the package: that one is used.
    ("import types; k = sys.modules['k_diffusion'] = types.ModuleType('k_diffusion'); k.__path__ = []\n"
     "s = sys.modules['k_diffusion.sampling'] = types.ModuleType('k_diffusion.sampling')\n"
     "s.sample_dpmpp_3m_sde = print", "assert samplers._sampling is s", ["k_diffusion", "k_diffusion.sampling"]),
])
def test_loads_without_the_training_half_or_torchvision(before, after, left):
    code = _IMPORT.format(before=before, after=after)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=golden.REPOSITORY)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(left)
