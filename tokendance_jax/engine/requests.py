"""From requests to sequences: tokenizing, limits, and checks before anything is computed."""

import dataclasses

from tokendance_jax.engine.adjust import check_logit_bias
from tokendance_jax.engine.answer import Answer
from tokendance_jax.engine.limits import answer_limit
from tokendance_jax.engine.sampling import agent_key, check_stop_ids, stop_ids_of
from tokendance_jax.engine.sequence import Handle, Mask, Sequence
from tokendance_jax.model import Model
from tokendance_jax.prompt.round import PromptError, Round, Sampling
from tokendance_jax.prompt.tokenized import TokenizedPrompt, tokenize_round


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how it is answered.

    Attributes:
      prompt: the prompt.
      sampling: how answers are sampled.
      limit: most tokens of an answer.
      names: name the request in errors: its round and its agent.
      round_index: number of its round; random keys depend on it.
    """

    prompt: TokenizedPrompt
    sampling: Sampling
    limit: int
    names: tuple[str, str]
    round_index: int = 0


def requests_of(
    model: Model,
    request: Round | TokenizedPrompt,
    *,
    chat: bool | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
) -> list[Request]:
    """Tokenizes a round, or takes one prompt as it is, and checks it against the model.

    Args:
      model: the model.
      request: a round or a prompt.
      chat: whether to wrap a round's segments in the model's chat markup; None: if the model has a
        template.
      sampling: how answers are sampled; None: as the round says, or greedily.
      max_new_tokens: limit for the answers; None: as the round says, or the model's context.

    Raises:
      PromptError: a prompt cannot be served.
      ValueError: there are too many stop tokens, or a biased token is not in the vocabulary.
    """
    if isinstance(request, Round):
        if chat is None:
            chat = model.tokenizer.chat_template is not None
        prompts = tokenize_round(request, model.tokenizer, chat=chat)
        index, name = request.index, f"round {request.index}"
        wanted = [own.max_new_tokens or request.max_new_tokens for own in request.agents]
        samplings = [own.sampling or request.sampling for own in request.agents]
    else:
        prompts, index, name = [request], 0, "request"
        wanted, samplings = [None], [Sampling()]
    found = []
    for prompt, limit, own in zip(prompts, wanted, samplings, strict=True):
        names, own = (name, f"agent {prompt.agent!r}"), sampling or own
        limit = answer_limit(": ".join(names), prompt, max_new_tokens or limit, model.config)
        check_stop_ids(stop_ids_of(own, model.tokenizer.stop_ids))
        check_logit_bias(own, model.config.vocab_size)
        found.append(Request(prompt, own, limit, names, index))
    return found


def check_number(requests: list[Request], *, answers: int, lanes: int) -> None:
    """Refuses more answers at once than decode together.

    Raises:
      PromptError: there are more than `lanes`.
      ValueError: `answers` is below 1.
    """
    if answers < 1:
        raise ValueError(f"answers: {answers} is too small; give at least 1")
    if (number := len(requests) * answers) > lanes:
        raise PromptError(
            f"{requests[0].names[0]}: {number} agents, the engine serves at most {lanes}; raise "
            "max_agents"
        )


def add_answers(
    handle: Handle, request: Request, model: Model, *, answers: int, mask: Mask | None
) -> None:
    """Adds one sequence for each answer to a request; those behind the first copy its prompt."""
    sampling, agent = request.sampling, request.prompt.agent
    copies = None
    for answer in range(answers):
        name = f"{agent}\0{answer}" if answer else agent
        sequence = Sequence(
            request.prompt,
            Answer(
                model.tokenizer,
                limit=request.limit,
                stop=sampling.stop,
                stop_ids=stop_ids_of(sampling, model.tokenizer.stop_ids),
            ),
            sampling,
            agent_key(sampling.seed, request.round_index, name),
            request.names,
            handle,
            copies,
            mask,
        )
        sequence.ask_mask()
        copies = copies or sequence
        handle.sequences.append(sequence)
