"""torch's descriptions of optimizers (OptimizerInfo), made for ours: what torch's own optimizer tests run over."""

from typing import Any

import torch
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

import fastewc

NAMES = ("SGD", "Adam", "AdamW")
#: Of torch's file of optimizer tests: those that say what a good citizen is.
NAMED = (
    "test_fused_matches_forloop",
    "test_fused_does_not_step_if_foundinf",
    "test_tensor_lr",
    "test_param_groups_lr",
    "test_param_groups_weight_decay",
    "test_state_dict_deterministic",
    "test_can_load_older_state_dict",
    "test_can_load_from_to_named_state_dict",
    "test_save_load_equality_with_weights_only",
    "test_load_nontensor_step",
    "test_grads_are_never_inplaced_into",
    "test_step_is_noop_when_params_have_no_grad",
    "test_step_is_noop_for_zero_grads",
    "test_state_dict_pre_hook",
    "test_state_dict_post_hook",
    "test_state_dict_pre_post_hook",
    "test_load_state_dict_pre_hook_and_prepend",
    "test_load_state_dict_post_hook",
    "test_load_state_dict_pre_post_hook",
    "test_step_pre_hook",
    "test_step_post_hook",
    "test_step_all_hooks",
    "test_deepcopy_copies_all_public_attrs",
    "test_mixed_device_dtype",
    "test_errors",
)


def info(name: str) -> OptimizerInfo:
    """What torch says of its own optimizer of that name, said of ours."""
    theirs = next(one for one in optim_db if one.optim_cls is getattr(torch.optim, name))
    return OptimizerInfo(
        getattr(fastewc.optim, name),
        optim_inputs_func=theirs.optim_inputs_func,
        scheduler_inputs=theirs.scheduler_inputs,
        supported_impls=("foreach", "fused"),  # differentiable=True is refused
        not_og_supported_flags=theirs.not_og_supported_flags,
        supports_sparse=False,
        has_capturable_arg=theirs.has_capturable_arg,
        supports_complex=False,
        # The tolerances of the 16-bit dtypes in test_fused_matches_forloop; skips are about other tests.
        decorators=theirs.decorators,
        optim_error_inputs_func=theirs.optim_error_inputs_func,
        supports_fused_on=("cpu", "cuda"),
    )


def configs(
    described: OptimizerInfo, device: str, dtype: torch.dtype = torch.float32
) -> list[tuple[str, dict[str, Any]]]:
    """(words, arguments) of every configuration that torch's tests try: for-loop, foreach and fused."""
    inputs: list[OptimizerInput] = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, described)
    assert inputs
    return [(one.desc, one.kwargs) for one in inputs]
