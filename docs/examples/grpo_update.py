"""A GRPO update: groups of responses instead of a critic, and micro-batches that change nothing."""

import torch

import ppo_kernels as pk

torch.manual_seed(0)
PROMPTS, K, T, V = 4, 4, 10, 100
B = PROMPTS * K
logits = torch.randn(B, T, V, requires_grad=True)  # a model's output for the responses
labels = torch.randint(V, (B, T))
mask = torch.arange(T) < torch.randint(3, T + 1, (B, 1))
scores = torch.randn(B)

with torch.no_grad():
    old_logprobs = pk.token_logprobs(logits, labels, mask=mask)
    ref_logprobs = old_logprobs + 0.05 * torch.randn(B, T)
advantages = pk.group_advantages(scores, group_size=K, mode="grpo")  # "rloo": the mean of the others is the baseline

# Token-mean over the whole batch, whatever the micro-batches: the normalizer is that of the batch.
_, normalizer = pk.aggregation_weights(mask, "token-mean")
total = 0.0
for rows in torch.arange(B).split(B // 2):
    logprobs = pk.token_logprobs(logits[rows], labels[rows], mask=mask[rows])
    loss, stats = pk.policy_loss(
        logprobs, old_logprobs[rows], advantages[rows], mask[rows], cliprange=(0.2, 0.28),
        ref_logprobs=ref_logprobs[rows], kl_coef=0.01, kl_estimator="k3", normalizer=normalizer,
    )  # fmt: skip
    loss.backward()  # gradients add up over micro-batches
    total += loss.item()

accumulated, logits.grad = logits.grad, None
logprobs = pk.token_logprobs(logits, labels, mask=mask)
loss, stats = pk.policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    cliprange=(0.2, 0.28),
    ref_logprobs=ref_logprobs,
    kl_coef=0.01,
    kl_estimator="k3",
)
loss.backward()
torch.testing.assert_close(accumulated, logits.grad)
print(f"loss {loss.item():.5f}, in two micro-batches {total:.5f}; KL to the reference {stats.ref_kl.item():.5f}")
