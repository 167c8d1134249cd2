"""A policy update where the vocabulary is cut over the ranks of a tensor-parallel group: torchrun --nproc-per-node 2.

Started alone it is a group of one rank.
"""

import os

import torch
import torch.distributed as dist

import ppo_kernels as pk

for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
    os.environ.setdefault(name, alone)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # every rank has the same batch
B, T, H, V = 4, 16, 32, 5001
hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H) / H**0.5
labels, advantages = torch.randint(V, (B, T)), torch.randn(B, T)
mask = torch.arange(T) < torch.tensor([16, 9, 12, 3])[:, None]
first, last = V * rank // ranks, V * (rank + 1) // ranks
shard = weight[first:last].clone().requires_grad_()  # of the head: this rank's rows
group = {"group": dist.group.WORLD, "vocab_start": first}


def update(logprobs):
    loss, _ = pk.policy_loss(logprobs, logprobs.detach() - 0.1, advantages, mask)
    of_hidden, of_shard = torch.autograd.grad(loss, (hidden, shard))
    return loss.detach(), of_hidden, of_shard


# From logits that a column-parallel head has computed: four numbers of each row travel, not its logits.
logits = hidden @ shard.T
loss, of_hidden, of_shard = update(pk.token_logprobs(logits, labels, mask=mask, **group))
dist.all_reduce(of_hidden)  # each rank's head has added its part

# From hidden states: no logits [B, T, V / ranks] either, and the gradient of the hidden states is that of all ranks.
fused = update(pk.linear_token_logprobs(hidden, shard, labels, mask=mask, **group))

# The same on one rank.
whole = weight.clone().requires_grad_()
logprobs = pk.token_logprobs(hidden @ whole.T, labels, mask=mask)
want, _ = pk.policy_loss(logprobs, logprobs.detach() - 0.1, advantages, mask)
grads = torch.autograd.grad(want, (hidden, whole))
for got in ((loss, of_hidden, of_shard), fused):
    torch.testing.assert_close(got, (want.detach(), grads[0], grads[1][first:last]), atol=1e-6, rtol=1e-4)
print(f"rank {rank} of {ranks}: rows {first} to {last - 1} of the head, loss {loss.item():.5f}")
dist.destroy_process_group()
