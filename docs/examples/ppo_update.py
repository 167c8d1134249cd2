"""PPO with the ops alone: rollout, rewards, advantages, epochs of minibatches. It needs no file and no network."""

import torch

import ppo_kernels as pk

torch.manual_seed(0)
B, T, V, H, PROMPT = 16, 12, 50, 32, 4


class Policy(torch.nn.Module):
    """A language model and a critic, as small as they come: what the ops see is what a large one would give them."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, H)
        self.body = torch.nn.GRU(H, H, batch_first=True)
        self.lm_head, self.value_head = torch.nn.Linear(H, V, bias=False), torch.nn.Linear(H, 1)

    def forward(self, tokens):
        hidden, _ = self.body(self.embed(tokens))
        # Position t predicts token t + 1: the responses' tokens are predicted from PROMPT - 1 on.
        hidden = hidden[:, PROMPT - 1 : -1]
        return self.lm_head(hidden), self.value_head(hidden).squeeze(-1)


@torch.no_grad()
def generate(policy, prompts):
    tokens = prompts
    for _ in range(T):
        hidden, _ = policy.body(policy.embed(tokens))
        tokens = torch.cat([tokens, torch.multinomial(policy.lm_head(hidden[:, -1]).softmax(-1), 1)], 1)
    return tokens


policy, reference = Policy(), Policy()
reference.load_state_dict(policy.state_dict())
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
first = last = 0.0
for step in range(30):
    tokens = generate(policy, torch.randint(V, (B, PROMPT)))
    labels = tokens[:, PROMPT:]
    ends = (labels == 0).int()  # token 0 ends a response; what follows it is padding
    mask = ends.cumsum(1) - ends == 0
    scores = ((labels % 2 == 0) & mask).sum(1) / mask.sum(1)  # the reward: even tokens

    with torch.no_grad():
        logits, values = policy(tokens)
        old_logprobs = pk.token_logprobs(logits, labels, mask=mask)
        ref_logprobs = pk.token_logprobs(reference(tokens)[0], labels, mask=mask)
    rewards, kl = pk.kl_rewards(old_logprobs, ref_logprobs, scores, mask, kl_coef=0.02)
    advantages, returns = pk.gae(rewards, values, mask, gamma=1.0, lam=0.95)
    advantages = pk.whiten(advantages, mask)

    for _ in range(2):  # epochs
        for rows in torch.randperm(B).split(B // 2):  # minibatches
            logits, new_values = policy(tokens[rows])
            logprobs = pk.token_logprobs(logits, labels[rows], mask=mask[rows])
            pg_loss, stats = pk.policy_loss(logprobs, old_logprobs[rows], advantages[rows], mask[rows], cliprange=0.2)
            vf_loss, _ = pk.value_loss(new_values, values[rows], returns[rows], mask[rows], cliprange_value=0.2)
            optimizer.zero_grad()
            (pg_loss + 0.1 * vf_loss).backward()
            optimizer.step()
    last = float(scores.mean())
    first = first or last
    if step % 10 == 0 or step == 29:
        print(f"step {step:2d}: score {last:.2f}, KL {float(kl.mean()):.3f}, clipped {float(stats.clipfrac_high):.2f}")
assert last > first + 0.1, "the score should have risen"
