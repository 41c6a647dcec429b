"""The public kernels with the fields of their head given flat, as the tests' cases list them."""

from functools import wraps

from kimi_core import kernels

FIELDS = ("bias", "temperature", "softcap", "tp_group")


def flat(kernel):
    @wraps(kernel)
    def call(hidden, weight, ids, *args, **options):
        fields = {name: options.pop(name) for name in FIELDS if name in options}
        return kernel(hidden, kernels.Head(weight, **fields), ids, *args, **options)

    return call


linear_logprob = flat(kernels.linear_logprob)
linear_logprob_ref = flat(kernels.linear_logprob_ref)
omd_loss = flat(kernels.omd_loss)
omd_loss_ref = flat(kernels.omd_loss_ref)
