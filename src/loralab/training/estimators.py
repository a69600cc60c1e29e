"""What is estimated in reinforcement learning: divergences, advantages, returns. Pure functions on tensors.

Legend: π the policy, q the reference, a the written token, k an estimate of KL(π‖q) at one token.

What the gradient of J = E[(1 − β) r − β Σₜ KLₜ] asks for: where k has the mean KLₜ, ∇E[Σ k] = E[∇log π(answer) · Σ k] + E[Σ ∇k],
so k belongs in the reward, where it weighs on the tokens before it, and, differentiated, in the loss.
- k₁ = log π(a) − log q(a): its own gradient is a score function, which has mean 0, so it stands in the reward alone.
- The exact KL: in the reward (without gradient) and in the loss (with it).
- k₃ in the loss alone, as in GRPO: the mean of ∇k₃ is ∇KL(q‖π), the other divergence; near π = q the two agree to first order.
- ρ k₃ in the loss, with ρ = π/π_old differentiated too: the mean of ∇(ρ k₃) over a drawn from π_old is ∇KL(π‖q), whether or not
  π has moved since. That of its own token: what a token changes about the KL of later ones is left out, as in GRPO's exact KL.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

GRPO_EPSILON = 1e-4
"""Added to the spread of rewards, which may be 0."""
HEAVIEST = 3.0
"""Largest weight of an answer that a stand-in wrote; TRL's limit for vLLM."""


def log_ratio(log_probs: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Estimate KL(π‖q) by k₁ = log π(a) − log q(a) for a drawn from π (nats): unbiased, of either sign."""
    return log_probs - reference


def kl_per_token(log_probs: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Estimate KL(π‖q) by k₃ = q/π − 1 − log(q/π) for a drawn from π (nats): unbiased, never negative.

    Paper: Schulman 2020, "Approximating KL divergence"; GRPO (Shao et al. 2024, 2402.03300, eq. 4) takes it as a loss.

    Args:
        log_probs: log π(a).
        reference: log q(a).
    """
    log_q_over_p = reference - log_probs
    return torch.expm1(log_q_over_p) - log_q_over_p


def weighted_kl(
    log_probs: Float[Tensor, "*n"], old: Float[Tensor, "*n"], reference: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Estimate KL(π‖q) by ρ k₃, ρ = π/π_old, for a drawn from π_old (nats): unbiased, and so is its gradient; never negative.

    Paper: DeepSeek-V3.2 (2512.02556), "Unbiased KL Estimate"; TRL's `use_bias_correction_kl`. The ratio is not clipped.

    Args:
        log_probs: log π(a), with gradient.
        old: log π_old(a), without; where π has not moved, the same numbers.
        reference: log q(a).
    """
    return torch.exp(log_probs - old) * kl_per_token(log_probs, reference)


def exact_kl(logits: Float[Tensor, "*n vocab"], reference: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """Sum π log(π/q) over the vocabulary (nats)."""
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(logits: Float[Tensor, "*n vocab"]) -> Float[Tensor, "*n"]:
    """Sum −π log π over the vocabulary (nats)."""
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).sum(-1)


def rloo_advantages(rewards: Float[Tensor, "*prompts samples"]) -> Float[Tensor, "*prompts samples"]:
    """Compare each answer's reward with the mean of the other answers to its prompt; at least two.

    Paper: Kool et al. 2019; Ahmadian et al. 2024 (2402.14740). The baseline does not depend on the answer, so the gradient stays
    unbiased.
    """
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others


def grpo_advantages(rewards: Float[Tensor, "*prompts samples"]) -> Float[Tensor, "*prompts samples"]:
    """Standardise the rewards of the answers to each prompt: (r − mean) / (sd + 10⁻⁴), sd over samples − 1; at least two.

    Paper: Shao et al. 2024 (2402.03300), section 4.1.2; sd and its 10⁻⁴ as in TRL. The answer's own reward is in the mean and the
    spread is divided out, so what is climbed is not J itself: prompts of small spread count for more.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + GRPO_EPSILON)


def returns(rewards: Float[Tensor, "answers steps"]) -> Float[Tensor, "answers steps"]:
    """Sum each token's reward and those after it: Zₜ = Σ rₛ over s ≥ t, undiscounted.

    Paper: REINFORCE for language models, Lee et al. 2023 (2309.00267), which P5 trains its policies by.
    """
    return rewards.flip(-1).cumsum(-1).flip(-1)


def clipped(
    log_probs: Float[Tensor, " tokens"],
    old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    clip: float,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Weigh each token by the ratio of new to old probability, which gains nothing beyond 1 ± clip.

    Paper: Schulman et al. 2017 (1707.06347), eq. 7: max(−ρ A, −clamp(ρ, 1 − ε, 1 + ε) A) with ρ = π/π_old.

    Args:
        log_probs: of the written tokens, with gradient.
        old: the same by the policy that wrote them, without.
        advantages: without gradient.
        clip: ε.

    Returns:
        The loss of each token, the ratios, and which tokens are held back (their gradient is 0).
    """
    ratio = torch.exp(log_probs - old)
    free, held = -ratio * advantages, -ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.maximum(free, held), ratio.detach(), (held > free).detach()


def answer_weights(
    log_probs: Float[Tensor, " tokens"], drawn: Float[Tensor, " tokens"], tails: Sequence[int]
) -> Float[Tensor, " answers"]:
    """Weigh answers that a stand-in μ wrote as if the policy had: w = π(answer)/μ(answer), at most `HEAVIEST`.

    Paper: truncated importance sampling, Ionides 2008; TRL corrects what vLLM writes by the same ratio of a whole answer, and drops
    answers where this cuts. Where nothing is cut E_μ[w f] = E_π[f], and the gradient of J stays unbiased.

    Args:
        log_probs: log π of the written tokens, without gradient.
        drawn: log μ of them.
        tails: tokens of each answer.
    """
    apart = (log_probs - drawn).split(list(tails))
    return torch.stack([each.sum() for each in apart]).exp().clamp(max=HEAVIEST)


def explained_variance(values: Float[Tensor, " n"], targets: Float[Tensor, " n"]) -> float | None:
    """Give the share of the targets' variance that the values explain, 1 − var(Z − V)/var(Z); None where they do not vary."""
    spread = targets.var(correction=0)
    return None if not spread else float(1 - (targets - values).var(correction=0) / spread)
