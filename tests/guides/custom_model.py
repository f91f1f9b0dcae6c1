"""The guide "4-bit layers in a model of your own", with halfbyte's name where bitsandbytes' stood."""

import sys

import halfbyte as bnb
import torch
from torch import nn

folder = sys.argv[2]
device = "cuda" if torch.cuda.is_available() else "cpu"
plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
quantized = nn.Sequential(
    bnb.nn.Linear4bit(64, 256, compute_dtype=torch.float32, quant_type="nf4"),
    nn.ReLU(),
    bnb.nn.LinearNF4(256, 64, compute_dtype=torch.float32),
)
quantized.load_state_dict(plain.state_dict())
quantized = quantized.to(device)  # quantized here
x = torch.randn(8, 64, device=device)
wanted = plain.to(device)(x)
print("error", ((quantized(x) - wanted).norm() / wanted.norm()).item())
torch.save(quantized.state_dict(), f"{folder}/model.pt")
again = nn.Sequential(bnb.nn.LinearNF4(64, 256), nn.ReLU(), bnb.nn.LinearNF4(256, 64))
again.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
print("reloaded", torch.equal(again.to(device)(x), quantized(x)))
