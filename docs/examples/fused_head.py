"""A policy update from hidden states: the logits never exist as a whole, and loss and gradients are those with them."""

import torch

import ppo_kernels as pk

torch.manual_seed(0)
B, T, H, V = 4, 16, 32, 5000
body = torch.nn.Linear(H, H)  # in place of a model's layers
lm_head = torch.nn.Linear(H, V, bias=False)
inputs, labels = torch.randn(B, T, H), torch.randint(V, (B, T))
mask = torch.arange(T) < torch.tensor([16, 9, 12, 3])[:, None]
advantages = torch.randn(B, T)
parameters = [*body.parameters(), *lm_head.parameters()]

with torch.no_grad():  # log-probabilities of the rollout: one matrix product, a tile of logits at a time
    old_logprobs = pk.linear_token_logprobs(body(inputs), lm_head.weight, labels, mask=mask)

# The loss and its gradients in three matrix products; what is masked enters none.
loss, stats, logprobs = pk.linear_policy_loss(
    body(inputs), lm_head.weight, labels, old_logprobs, advantages, mask, cliprange=0.2
)
fused = torch.autograd.grad(loss, parameters)

# The same by way of the logits.
logits = lm_head(body(inputs))
whole, _ = pk.policy_loss(pk.token_logprobs(logits, labels, mask=mask), old_logprobs, advantages, mask, cliprange=0.2)
torch.testing.assert_close(loss, whole)
torch.testing.assert_close(fused, torch.autograd.grad(whole, parameters), atol=1e-6, rtol=1e-4)
print(f"loss {loss.item():.5f} and {whole.item():.5f}; ratio {stats.ratio_mean.item():.3f}")
