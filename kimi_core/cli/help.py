"""What ``kimi COMMAND --help`` says."""

NEW = """Begin a task of yours: a folder with three files that run at once.

    kimi new mytask && cd mytask && kimi train mytask.toml

task.py says what is asked and has examples, reward.py what a response is worth, and mytask.toml has
the settings. As they come, a small model learns from random weights to count weekdays, in minutes
on two cores. Change them to what you want to be learned."""

CONFIG = """List settings with their defaults.

    kimi config                     # all
    kimi config trainer             # a section
    kimi config rollout.stop

A command takes them as section.key=value, a TOML file as key = value under [section]."""

TRAIN = """Train a reasoning model by reinforcement learning (section 2.3 of the Kimi k1.5 report).

    kimi train                              # the config `think`: minutes on a laptop
    kimi train smollm2 seed=1               # a real pretrained model
    kimi train my.toml trainer.tau=0.1
    kimi train --dry-run                    # what would run, its memory and its time
    kimi train --resume                     # start, or continue after a crash or Ctrl-C
    kimi train --resume --from 40 trainer.learning_rate=5e-5    # go back to a kept state

Any setting is overridden as section.key=value; `kimi config` lists them."""

SFT = """Supervised fine-tuning alone (section 2.2): packed sequences, loss on the responses.

    kimi sft name=warm                      # the SFT phase of the config `think`
    kimi sft my.toml model.name=smollm2-135m sft.data=chains.jsonl

Writes runs/NAME/checkpoint in Hugging Face format, which `kimi train` takes as model.name (with
sft.data=none), and evaluates it on the held-out prompts."""

EVALUATE = """Accuracy of a model on held-out prompts, on HumanEval or on a benchmark.

    kimi evaluate model.name=runs/think/checkpoint
    kimi evaluate smollm2 seed=1 prompts.held_out=400
    kimi evaluate --task humaneval model.name=smollm2-135m
    kimi evaluate --task humaneval --solutions canonical
    kimi evaluate --benchmark gsm8k --data test.jsonl --samples 8 model.name=my-model

Prints one JSON line: the numbers of an evaluation line of metrics.jsonl or, for HumanEval (whose
default config is `humaneval`), the counts of verdicts and pass@1.

`--benchmark` reads a published benchmark from a file or folder, asks its problems as
kimi_core/evaluation/benchmarks.py says (default config: `benchmark`), and prints avg@k, pass@k,
maj@k and lengths with intervals. They are in runs/NAME/BENCHMARK/results.json, too, with all that
repeats them. The same command goes on after a crash."""

CURATE = """Make a training set of prompts, with a report (section 2.1).

    kimi sft name=warm && kimi curate       # problems that ship with the package: minutes
    kimi curate problems.jsonl my.toml
    kimi curate problems.jsonl my.toml curate.highest_difficulty=0.8

Drops multiple-choice, true/false and proof questions, near-duplicates, prompts of evaluation sets
(curate.evaluation_sets), prompts that are easy to hack, trivial and hopeless ones. `model` answers,
`rollout` says how, `reward` judges. Writes curated.jsonl, dropped.jsonl, report.md and the record
answers.jsonl to runs/NAME. The same command goes on after a crash, and takes other thresholds
without asking the model again."""

WARMUP = """Collect long, verified answers for supervised fine-tuning (section 2.2).

    kimi sft name=warm
    kimi warmup name=long model.name=runs/warm/checkpoint 'warmup.ask="{prompt}"'
    kimi sft name=longer model.name=runs/warm/checkpoint sft.data=runs/long/warmup.jsonl

`model` answers the training prompts as `warmup.ask` asks it, `reward` judges. Right answers that
plan, evaluate, reflect and explore are kept, the longest first. Writes warmup.jsonl, the report
warmup.md and the record answers.jsonl to runs/NAME; the same command goes on after a crash."""

LONG2SHORT = """Make a model that thinks long answer shorter, by four methods (section 2.4).

    kimi long2short runs/think                      # all four, minutes on a laptop
    kimi long2short runs/think --seeds 0 1 2 3 4
    kimi long2short runs/think --methods merge --short models/short --weights 0.7 0.3
    kimi long2short runs/think --out shorter long2short.rl.length_weight=0.5

merge averages weights with those of short models, shortest is SFT on the shortest right one of 8
samples, dpo prefers it to longer ones, and rl is a second RL phase with the length reward. Settings
are those of the run and of [long2short]. Writes summary.json and figure7.png, accuracy against mean
tokens, to runs/NAME/long2short. The same command goes on after a crash."""

CHECK = """Check programming problems and their reference solutions before a run.

    kimi check prompts.source=problems.jsonl
    kimi check humaneval

Every reference solution (`answer`) must pass its tests, and an empty program must not. Prints a
JSON line for each problem that cannot be trained on, then the counts."""

REWARD = """Train the two reward models of section 2.3.5 and compare them.

    kimi reward                                     # a small model from scratch, both kinds
    kimi reward --kind classic --model smollm2-135m
    kimi reward --data labelled.jsonl --save models

`--data` is JSONL as kimi_core/reward/judges/labelled.py describes it. Without it the examples are
sums made from the `multiply` prompts. Prints a JSON line for each model: accuracy and calibration
on examples whose problem was in no training example."""

REPLAY = """Do one iteration of a run again and compare it with what the run recorded, bit for bit.

    kimi replay runs/think --iteration 12

Needs the state of the iteration before, which keep_states may keep. Compares metrics other than
times, every response in trajectories/, and the weights of the next state. Its exit status is 0 if
all is equal and 1 if not; the first difference is printed, and what differs in libraries,
processor and threads."""

DASHBOARD = """Look at runs in a browser: curves, groups, every token, the buffer, prompts.

    kimi dashboard                          # the runs in runs/
    kimi dashboard runs/think --port 0
    kimi dashboard runs --bundle copy       # files to open or to publish, without a server
    kimi dashboard runs --bundle copy --iterations 1 30 60

Serves this machine alone, reads the runs' files and changes nothing, and follows runs that are
going on. docs/dashboard.md has the pages and the keys."""

CHAT = """Ask the model of a run: k responses with their rewards.

    kimi chat runs/think                            # type prompts
    kimi chat runs/think '3*214=' --samples 8
    kimi chat runs/think --prompt 12 --before       # one of the run's, before and after RL
    kimi chat runs/think --prompt 12 --at 30        # the state after iteration 30

Only states that the run keeps can be asked (keep_states); --before needs the one after iteration 0,
or a run without SFT. A prompt that the run has is judged with its answer, any other with --answer.
The run's folder is not changed."""

COMPLETION = """Print a script that completes commands, configs and settings in a shell.

    kimi completion bash >> ~/.bashrc
    kimi completion zsh >> ~/.zshrc"""

PUSH = """Upload the checkpoint of a run to the Hugging Face hub, with a page about the run.

    kimi push runs/think me/think
    kimi push runs/think me/think --best --public

A new repository is private unless --public is given. `hf auth login` or HF_TOKEN says who you
are."""

WORKER = """Sample for a run of another host.

    kimi train my.toml cluster.listen=10.0.0.1:29500 cluster.token_file=token    # on its host
    kimi worker --connect 10.0.0.1:29500 --token-file token                      # on this one

Gets the model and the weights from the run, so nothing but the package and the token has to be
here. Joins again after a cut, at the weights of that time. Ends when the run is over, or when
nobody has answered for --patience seconds. docs/fleet.md says what happens when hosts are lost."""

ENGINE = """Serve the life of one engine of this host over HTTP.

    kimi engine my.toml rollout.workers=2 --http 10.0.0.2:8300 --token-file token
    curl -X POST -H "Authorization: Bearer $(cat token)" -H 'Content-Type: application/json' \\
        -d '{"model": "runs/mine/checkpoint", "version": 0}' http://10.0.0.2:8300/start

Also /serve (another checkpoint), /wake, /sleep, /generate, /stop, and GET /state. The sections
model and rollout of the config count. docs/fleet.md says more."""
