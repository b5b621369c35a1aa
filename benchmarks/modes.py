"""What measuring and reporting share: how a loss is differentiated, what counts as small."""

# The student's gradient; the same of half the loss, so that what comes from above is not 1; the teacher's as well.
MODES = ("forward", "forward_backward", "forward_backward_half", "forward_backward_teacher")
FEW_MODES = MODES[:2]
# Fewer logits than these are a matter of what a call costs by itself: of launches, on a GPU.
SMALL = 2**23
# Fewest bytes per logit pair, in logits: both are read; each gradient is written, and kl_div's
# backward, a call of its own, reads the target again, and both sides for the target's gradient.
MINIMUM_TRAFFIC = {
    ("distillation_loss", "forward"): 2,
    ("distillation_loss", "forward_backward"): 3,
    ("distillation_loss", "forward_backward_half"): 3,
    ("distillation_loss", "forward_backward_teacher"): 4,
    ("kl_div", "forward"): 2,
    ("kl_div", "forward_backward"): 4,
    ("kl_div", "forward_backward_half"): 4,
    ("kl_div", "forward_backward_teacher"): 6,
}
