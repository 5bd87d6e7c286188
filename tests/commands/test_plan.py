"""The command that shows a plan: what it prints of a config."""

from grpo_jax import plan
from grpo_jax.models.loading import load_model, save_model


def test_the_plans_own_config_on_a_local_model(tmp_path, capsys):
    """The configuration of the plan word for word, its gpt2 replaced by a local directory."""
    model = load_model("packaged:arithmetic")
    save_model(model, model.params, tmp_path / "gpt2")
    (tmp_path / "plan.yaml").write_text(
        "algorithm: {name: grpo, group_size: 8, kl_coef: 0.1, clip_range: 0.2}\n"
        f'model: {{type: policy, hf_model_name: "{tmp_path}/gpt2"}}\n'
        "training: {batch_size: 32, learning_rate: 1e-5, num_epochs: 100}\n"
    )
    argv = [f"--config={tmp_path}/plan.yaml", "--sampling.max_new_tokens=5", f"--run_dir={tmp_path}/run"]
    assert plan.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"grpo on {tmp_path}/gpt2 (0.4 M parameters, float32) with exact_match, ")
    assert (
        "4 prompts × 8 completions = 32 per update, 189,700 updates = 100.00 epochs of 7,588 prompts" in out
    )
    assert "256 of 512 held-out prompts" in out and "3 compilations + 2 for evaluation" in out
    assert not (tmp_path / "run").exists()
