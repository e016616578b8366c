from transformers import AutoTokenizer


def get_tokenizer(name, *, tokenizer_mode="auto", trust_remote_code=False, revision=None, **arguments):
    return AutoTokenizer.from_pretrained(name, revision=revision, **arguments)
