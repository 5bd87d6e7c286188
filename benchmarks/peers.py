"""Ours against another trainer on the same work: the two run in turn, each round gives one ratio.

    python benchmarks/peers.py --trl-python ENV/bin/python --trl-script PEERS/trl_step.py
    python benchmarks/peers.py --tunix-python ENV/bin/python --tunix-script PEERS/tunix_step.py --rows first
    python benchmarks/peers.py ... --rows first prompt256 --rounds 5 --steps 4 --json out.json

A peer is a script that times its own step in an environment of its own, and prints one JSON object last:

    trl      SCRIPT MODEL_DIR PROMPT COMPLETION PROMPTS GROUP STEPS KL_COEF
             -> step_median_s, generate_median_s
    tunix    SCRIPT --layers ... --vocab ... --prompt-len ... --completion-len ... --num-prompts ...
             --group-size ... --beta ... --steps ... --reps ... --skip ref_logps,train_step
             -> e2e_step_median_s, sampler_warm_median_s; a Qwen2-style model of equal matmul cost

Both run on the CPU, one at a time, with every core and the same environment. Peak memory is that of the whole
process, as the kernel counts it.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from random_models import Shape, find_model, parse_shape
from work import ROWS, Work, environment, markdown_row, run_process, run_step


def trl_command(python: str, script: str, work: Work, steps: int) -> list[str]:
    """Returns the command that times TRL: `steps` after the first."""
    sizes = (work.prompt, work.completion, work.prompts, work.group, steps + 1, work.kl_coef)
    return [python, script, find_model(work.model), *map(str, sizes)]


def tunix_command(python: str, script: str, work: Work, steps: int) -> list[str]:
    """Returns the command that times Tunix on a model of the same sizes."""
    shape = parse_shape(work.model)
    if not isinstance(shape, Shape):
        raise ValueError(f"Tunix has a model of its own and needs its sizes; {work.model!r} is a directory")
    options = {
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "vocab": shape.vocab,
        "prompt-len": work.prompt,
        "completion-len": work.completion,
        "num-prompts": work.prompts,
        "group-size": work.group,
        "beta": work.kl_coef,
        "lr": 1e-5,
        # It takes the median of the gaps between steps; the first is left out if there are three or more.
        "steps": max(steps, 2) + 2,
        "reps": steps,
        "skip": "ref_logps,train_step",
    }
    return [python, script, *(f"--{name}={value}" for name, value in options.items())]


# name -> (command, key of the step's seconds, key of the generation's)
PEERS = {
    "trl": (trl_command, "step_median_s", "generate_median_s"),
    "tunix": (tunix_command, "e2e_step_median_s", "sampler_warm_median_s"),
}


def last_json(output: str) -> dict[str, Any]:
    """Returns the object on the last line that holds one.

    Raises:
        ValueError: there is none.
    """
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise ValueError(f"the script printed no JSON object; its output ends with {output[-300:]!r}")


def time_peer(peer: str, python: str, script: str, work: Work, steps: int) -> dict[str, float]:
    """Runs a peer once; returns seconds of its step and generation, and bytes of its peak memory."""
    make_command, step, generate = PEERS[peer]
    env = environment(ours=False, JAX_PLATFORMS="cpu")
    output, memory = run_process(make_command(python, script, work, steps), env)
    found = last_json(output)
    return {"step": found[step], "generate": found[generate], "memory": memory}


def time_ours(work: Work, steps: int, options: Sequence[str]) -> dict[str, float]:
    """Runs step.py once; returns the same of ours."""
    found = run_step(work, *options, steps=steps, env=environment(JAX_PLATFORMS="cpu"))
    phases = found["phases"]
    return {
        "step": phases["step"]["median_s"],
        "generate": phases["generate"]["median_s"],
        "memory": found["process_peak"],
    }


def ratios(rounds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, list[float]]:
    """Returns theirs / ours of every round (theirs, ours), by what was measured: above 1 we need less."""
    return {
        name: [theirs[name] / ours[name] for theirs, ours in rounds]
        for name in ("step", "generate", "memory")
    }


HEADER = [
    "row", "peer", "round", "step theirs", "ours", "ratio", "generate theirs", "ours", "ratio",
    "GiB theirs", "ours", "ratio",
]  # fmt: skip


def round_line(row: str, peer: str, number: Any, theirs: dict, ours: dict, ratio: dict) -> str:
    """Returns one line of the table."""
    cells = [row, peer, number]
    for name in ("step", "generate", "memory"):
        scale, digits = (2**30, 2) if name == "memory" else (1, 3)
        cells += [f"{x[name] / scale:.{digits}f}" for x in (theirs, ours)] + [f"{ratio[name]:.2f}×"]
    return markdown_row(*cells)


def compare(row: str, peer: str, python: str, script: str, *, rounds: int, steps: int, options) -> dict:
    """Runs a peer and ours in turn, printing each round and the medians; returns everything."""
    work, found = ROWS[row], []
    for number in range(1, rounds + 1):
        theirs = time_peer(peer, python, script, work, steps)
        ours = time_ours(work, steps, options)
        found.append((theirs, ours))
        ratio = {name: values[-1] for name, values in ratios(found).items()}
        print(round_line(row, peer, number, theirs, ours, ratio), flush=True)
    middle = {name: statistics.median(values) for name, values in ratios(found).items()}
    theirs, ours = (
        {name: statistics.median(one[name] for one in side) for name in middle}
        for side in zip(*found, strict=True)
    )
    print(round_line(row, peer, "median", theirs, ours, middle), flush=True)
    return {"row": row, "peer": peer, "work": vars(work), "rounds": found, "median_ratios": middle}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for peer in PEERS:
        parser.add_argument(f"--{peer}-script", help=f"script that times {peer}")
        parser.add_argument(f"--{peer}-python", help=f"interpreter of the environment with {peer}")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["first"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of each process, after its first")
    parser.add_argument("--json", type=Path, help="file for everything measured")
    arguments, options = parser.parse_known_args()
    chosen = []
    for peer in PEERS:
        given = vars(arguments)[f"{peer}_python"], vars(arguments)[f"{peer}_script"]
        if all(given):
            chosen.append((peer, *given))
        elif any(given):
            parser.error(f"--{peer}-script and --{peer}-python go together")
    if not chosen:
        parser.error(f"give --PEER-script and --PEER-python for one of {', '.join(PEERS)}")
    print(markdown_row(*HEADER))
    print(markdown_row(*["---"] * len(HEADER)), flush=True)
    results = []
    for row in arguments.rows:
        for peer, python, script in chosen:
            results.append(
                compare(
                    row, peer, python, script, rounds=arguments.rounds, steps=arguments.steps, options=options
                )
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
