"""P3O with a reward of one's own: what a prompt adds to the scores of both responses changes nothing."""

import torch

import ppo_kernels as pk

torch.manual_seed(0)
PROMPTS, T, V = 8, 6, 20
table = torch.zeros(T, V, requires_grad=True)  # the policy: one distribution per position
optimizer = torch.optim.Adam([table], lr=0.1)
mask = torch.ones(2 * PROMPTS, T, dtype=torch.bool)


def reward(responses):
    """Yours: any number per response, such as the share of tokens below 5."""
    return (responses < 5).float().mean(1)


for step in range(40):
    with torch.no_grad():
        policy = torch.distributions.Categorical(logits=table)
        responses = policy.sample((2 * PROMPTS,))  # rows 2i and 2i + 1 answer one prompt
        rows = table.expand(2 * PROMPTS, T, V)
        old_logprobs = pk.token_logprobs(rows, responses)
        ref_logprobs = torch.full_like(old_logprobs, -torch.log(torch.tensor(float(V))))  # the reference is uniform
    of_prompt = 100.0 * torch.arange(PROMPTS).repeat_interleave(2)
    logprobs = pk.token_logprobs(table.expand(2 * PROMPTS, T, V), responses)
    scores = reward(responses)
    shifted = scores + of_prompt
    loss, _ = pk.p3o_loss(logprobs, old_logprobs, ref_logprobs, shifted, mask, variant="joint", kl_coef=0.05)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (0, 39):
        print(f"step {step:2d}: score {float(scores.mean()):.2f}")
assert float(scores.mean()) > 0.6
