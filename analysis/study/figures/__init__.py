"""One function per figure: rows in, matplotlib figure out."""

from study.figures.attention import (
    attention_stack,
    change_by_layer,
    course_by_task,
    focus,
    head_heat,
    layer_step_heat,
    three_measures,
    word_kinds,
    words_on_image,
)
from study.figures.comparison import ablation_dots, dimmed, kept_patches, loss_heat, method_styles, pareto
from study.figures.dynamics import forest, mean_schedules
from study.figures.efficiency import decode_reads, saving_realised, share_by_text
from study.figures.errata import mixed_protocols, share_and_macs, swapped_columns
from study.figures.predictor import (
    budget_met,
    gradient_truth,
    loss_by_share,
    predictor_weights,
    rates_by_image,
    rates_over_steps,
    signs_of_failure,
    training_curves,
)
