"""What a user's script may hold, for `petal-kernels memory --script`."""

SCRIPT = """
import functools
import torch
from torch import nn

SEEN = []

def build(batch=3, rank=5, length=None):
    SEEN.append((batch, rank))
    print("build called with", batch, rank)
    model = nn.Sequential(nn.Linear(16, rank), nn.Linear(rank, 16))
    return model, torch.randn(batch, 16)

def needs(batch, rank=4):
    return build(batch, rank)

def strange(path):
    return build()

def anything(**options):
    return build(options.get("batch", 3))

def checkpointed(checkpointing=True):
    return build()

def step():
    net = nn.Linear(64, 64)
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).sum()
    return run, (torch.randn(2, 64),)

def meta_step():
    with torch.device("meta"):
        net = nn.Linear(64, 64)
        x = torch.empty(2, 64)
    return lambda t: net(t).sum(), (x,)

class Trainer:
    def __init__(self):
        self.model = nn.Linear(8, 8)
    def loss(self, x):
        return self.model(x).sum()

def bound():
    return Trainer().loss, torch.randn(2, 8)

def two():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    helper = functools.partial(lambda model, x: model(x), first)
    return lambda x: second(helper(x)).sum(), torch.randn(2, 8)

WHOLE = nn.Linear(8, 8)

def whole(x):
    return WHOLE(x).sum()

def by_global():
    return whole, torch.randn(2, 8)

def told():
    nets = [nn.Linear(8, 8)]
    return (lambda x: nets[0](x).sum()), torch.randn(2, 8), None, nets[0]

class Slotted:
    __slots__ = ("net",)
    def __init__(self):
        self.net = nn.Linear(8, 8)
    def __call__(self, x):
        return self.net(x).sum()

def hidden():
    return Slotted(), torch.randn(2, 8)

def number():
    return 3, torch.randn(2, 8)

def one():
    return build()[0]

def bad_loss():
    return (*build(), "mse")

def bad_module():
    return (*build(), None, "net")

def nothing_to_derive():
    return nn.Identity(), ("words",)

def leaves():
    raise SystemExit(0)

def raises():
    raise ValueError("seven of mine")

class Wrong(nn.Module):
    def forward(self, x):
        raise TypeError("eight of mine")

def wrong_model():
    return Wrong(), torch.randn(2, 8)
"""
