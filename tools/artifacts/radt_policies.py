"""The behaviour policies of the page "Offline data", the first stage of `make artifacts PAPER=radt`.

One run of soft actor-critic per world, by Stable-Baselines3, which no extra of the package brings:
`.venv/bin/pip install -c constraints.txt stable-baselines3`. One thread, fixed seed; about five minutes for Pendulum
and one to two hours for HalfCheetah. A checkpoint is the actor alone, a tanh policy with two hidden layers. A world
whose run is finished under `_build/artifacts/radt` is not trained again.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import csv
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from glasses_nb.hub import require
from glasses_nb.radt.data import ENV_IDS, _quiet_mujoco

try:
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback
except ImportError:
    sys.exit(
        "Stable-Baselines3 trains the behaviour policies and is not installed: "
        ".venv/bin/pip install -c constraints.txt stable-baselines3"
    )

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "_build" / "artifacts" / "radt"
DEST = ROOT / "glasses_nb" / "artifacts" / "radt"
STEPS = {
    "pendulum": [0, 1_000, 2_000, 3_000, 4_000, 6_000, 10_000],
    "halfcheetah": [0, 5_000, 10_000, 20_000, 35_000, 60_000, 100_000, 150_000],
}
RATES = {"pendulum": 1e-3, "halfcheetah": 3e-4}
COLUMNS = ["policy", "world", "steps", "mean_return"]


def actor_weights(model):
    "Layers of the actor: two hidden ones, the mean, the logarithm of the standard deviation."
    actor = model.policy.actor
    layers = dict(
        hidden1=actor.latent_pi[0], hidden2=actor.latent_pi[2], mean=actor.mu, log_std=actor.log_std
    )
    return {
        f"{name}.{key}": value.detach().clone()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
    }


def mean_return(model, env_id, episodes=3):
    "Return of the policy without noise, over seeds 1000, 1001, ..."
    env, found = require("gymnasium", "rl").make(env_id), []
    for seed in range(episodes):
        state, done, total = env.reset(seed=1000 + seed)[0], False, 0.0
        while not done:
            action, _ = model.predict(state, deterministic=True)
            state, reward, end, cut, _ = env.step(action)
            total, done = total + float(reward), end or cut
        found.append(total)
    return float(np.mean(found))


class Keep(BaseCallback):
    "Keeps the actor and its return at chosen steps."

    def __init__(self, world):
        super().__init__()
        self.world, self.steps, self.rows, self.began = world, list(STEPS[world]), [], time.time()

    def _on_training_start(self):
        self._keep()

    def _on_step(self):
        self._keep()
        return True

    def _keep(self):
        while self.steps and self.num_timesteps >= self.steps[0]:
            step = self.steps.pop(0)
            name = f"{self.world}_{step:06d}"
            save_file(actor_weights(self.model), WORK / f"{name}.safetensors")
            found = mean_return(self.model, ENV_IDS[self.world])
            self.rows.append([name, self.world, step, f"{found:.1f}"])
            seconds = time.time() - self.began
            print(f"{name}: return {found:.1f} after {seconds:.0f} s", flush=True)


def train(world):
    "Rows of the table for one world, from its finished run or from a new one."
    done = WORK / f"{world}.csv"
    if not done.exists():
        keep = Keep(world)
        env = require("gymnasium", "rl").make(ENV_IDS[world])
        options = dict(net_arch=[64, 64])
        model = SAC("MlpPolicy", env, policy_kwargs=options, learning_starts=1_000, seed=0,
                    learning_rate=RATES[world])  # fmt: skip
        model.learn(STEPS[world][-1], callback=keep)
        part = done.with_suffix(".part")
        with open(part, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(keep.rows)
        part.rename(done)
    with open(done, newline="", encoding="utf-8") as f:
        return list(csv.reader(f))


def main():
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    with _quiet_mujoco():
        rows = [row for world in STEPS for row in train(world)]
    DEST.mkdir(parents=True, exist_ok=True)
    for name, *_ in rows:
        shutil.copyfile(WORK / f"{name}.safetensors", DEST / f"{name}.safetensors")
    with open(DEST / "policies.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows([COLUMNS, *rows])
    names = ("stable-baselines3", "gymnasium", "mujoco", "torch", "numpy")
    told = [
        "command: make artifacts PAPER=radt",
        f"python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names),
        f"{platform.machine()}, one thread, seed 0",
        "mean_return: three episodes without noise, seeds 1000 to 1002",
    ]
    (DEST / "policies.log").write_text("\n".join(told) + "\n", encoding="utf-8")
    print("written to", DEST.relative_to(ROOT))


if __name__ == "__main__":
    main()
