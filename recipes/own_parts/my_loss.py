"""A loss: for each token, from the logprobs of the policy and of the one that sampled. Pure torch."""


def soft_clip(logprobs, old_logprobs, advantages, rows):
    ratio = (logprobs - old_logprobs).exp()
    return -advantages * (ratio - 0.5 * (ratio - 1).square())
