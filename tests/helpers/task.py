"""A solution of the 2.5M-parameter task, as text: the class means, with a last step that a test can replace."""

from __future__ import annotations

MEANS = """
import torch
class Solution:
    def solve(self, train_loader, val_loader, metadata):
        assert metadata == {"num_classes": 128, "input_dim": 384, "param_limit": LIMIT, "baseline_accuracy": BASE,
                            "train_samples": 2048, "val_samples": 512, "test_samples": 1024, "device": "cpu"}, metadata
        assert train_loader.batch_size == val_loader.batch_size == 128
        batches = [*train_loader, *val_loader]
        inputs, labels = torch.cat([x for x, y in batches]), torch.cat([y for x, y in batches])
        means = torch.stack([inputs[labels == c].mean(0) for c in range(128)])
        head = torch.nn.Linear(384, 128)
        head.weight.data, head.bias.data = means, -0.5 * (means ** 2).sum(1)
        return self.finish(head)
    def finish(self, head):
        return head
"""


def finish(code: str) -> str:
    """Returns the class means with another last step, which has `head`, a linear layer, and `torch`."""
    return MEANS.replace("        return head\n", "".join(f"        {line}\n" for line in code.splitlines()))
