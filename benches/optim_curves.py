"""Loss curves of optimizers with 8-bit and with 32-bit states, on the same data and seeds.

``python benches/optim_curves.py train OUT.jsonl AdamW Lion ...`` trains two models for 300 steps with each named
optimizer in both widths: LoRA adapters of the small Llama in tests/models, and a small Llama from scratch. Texts are
the held-out ones of that model; batches come in one order, and a seed is one for both widths.
``python benches/optim_curves.py beside OUT.jsonl LAMB ...`` trains from scratch with bitsandbytes' 8-bit states, and
with 32-bit states from weights that differ by a thousandth: what a curve says that lies a little off.
``python benches/optim_curves.py plot OUT.jsonl OUT.png`` draws what several such files hold (append them) and prints
how far apart the two widths are.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

MODEL = Path(__file__).parents[1] / "tests/models/pycode-llama-7m"
STEPS, BATCH, LENGTH = 300, 4, 32
# What each needs to learn at about the same pace: with LoRA, from scratch. There AdamW, LAMB and LARS have the rate of
# least loss in 32 bits of some that were tried, and SGD one that is well below what diverges (benches/NOTES.md).
ARGUMENTS = {
    "AdamW": ({"lr": 1e-3}, {"lr": 5e-4}),
    "AdEMAMix": ({"lr": 5e-4, "t_alpha": 300, "t_beta3": 300}, {"lr": 5e-4, "t_alpha": 300, "t_beta3": 300}),
    "Lion": ({"lr": 1e-4}, {"lr": 1e-4}),
    # From scratch it diverges at 0.1 with one seed or another, in 32 bits too.
    "SGD": ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.02, "momentum": 0.9}),
    "RMSprop": ({"lr": 3e-4}, {"lr": 3e-4}),
    "Adagrad": ({"lr": 1e-2}, {"lr": 3e-3}),
    "LAMB": ({"lr": 1e-2}, {"lr": 5e-3}),
    "LARS": ({"lr": 0.5, "momentum": 0.9}, {"lr": 0.3, "momentum": 0.9}),
}


def batches(device):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = [i for text in json.loads((MODEL / "heldout.json").read_text()) for i in tokenizer(text)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH], device=device).view(-1, LENGTH)
    order = torch.randint(len(rows), (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    return rows[order.to(device)]


def model_of(task, name, device):
    import peft
    import transformers

    torch.manual_seed(0)
    if task == "LoRA":
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        # What is zero has no norm, and stays zero where a step is as long as the norm says.
        options = {"init_lora_weights": False} if name in ("LAMB", "LARS") else {}
        model = peft.get_peft_model(model, peft.LoraConfig(r=32, target_modules="all-linear", **options))
    else:
        config = transformers.AutoConfig.from_pretrained(MODEL)
        config.num_hidden_layers = 2
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device)


def train(task, name, bits, data, library="halfbyte", noise=0.0):
    model = model_of(task, name, data.device)
    params = [p for p in model.parameters() if p.requires_grad]
    if noise:
        torch.manual_seed(5)
        with torch.no_grad():
            for p in params:
                p.mul_(1 + noise * torch.randn_like(p))
    optim = importlib.import_module(f"{library}.optim")
    optimizer = getattr(optim, name)(params, optim_bits=bits, **ARGUMENTS[name][task != "LoRA"])
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smooth(losses, width=20):
    return torch.tensor(losses).unfold(0, width, 1).mean(dim=1)


def plot(path, image):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in Path(path).read_text().splitlines()]
    curves = {(e["task"], e["optimizer"], e["bits"]): smooth(e["losses"]) for e in entries}
    pairs = sorted({key[:2] for key in curves})
    tasks = sorted({task for task, _ in pairs})
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for index, name in enumerate(name for where, name in pairs if where == task):
            full, eight = curves[task, name, 32], curves[task, name, 8]
            apart = ((eight - full).abs() / full).max().item()
            print(f"{task:8} {name:9} loss {full[0]:.3f} to {full[-1]:.3f}, 8 bits at most {apart:.2%} off")
            axis.plot(full, color=f"C{index}", label=name, alpha=0.5)
            axis.plot(eight, color=f"C{index}", linestyle=":")
        axis.set(title=f"{task}: 32 bits (line) and 8 bits (dots)", xlabel="step", ylabel="loss, mean of 20 steps")
        axis.legend()
    figure.tight_layout()
    figure.savefig(image, dpi=110)


def main():
    if sys.argv[1] == "plot":
        return plot(*sys.argv[2:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = batches(device)
    if sys.argv[1] == "beside":
        cases = [("scratch", 8, "bitsandbytes", 0.0), ("scratch", 32, "halfbyte", 1e-3)]
    else:
        cases = [(task, bits, "halfbyte", 0.0) for task in ("LoRA", "scratch") for bits in (32, 8)]
    with Path(sys.argv[2]).open("a") as out:
        for name in sys.argv[3:]:
            for task, bits, library, noise in cases:
                entry = {"task": task, "optimizer": name, "bits": bits, "device": device, "torch": torch.__version__}
                if sys.argv[1] == "beside":
                    entry |= {"library": library, "noise": noise}
                out.write(json.dumps(entry | {"losses": train(task, name, bits, data, library, noise)}) + "\n")
                out.flush()
    return None


if __name__ == "__main__":
    main()
