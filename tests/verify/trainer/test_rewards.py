"""A model trained by a person's own function."""


def test_from_prompts_and_a_function_to_a_trained_model(tiny, folder):
    """What a newcomer does: his prompts, his function, a model of his, no reward model."""
    from python_trainer.models import save_model

    first = tiny()
    save_model(first.actor.model, first.tokenizer, folder / "model")
    trainer = tiny(
        task="files",
        data_path=str(folder),
        sft_model_path=str(folder / "model"),
        reward_function=f"{folder}/mine.py:most_wanted",
        algorithm="rloo",
        output_dir=str(folder / "mine"),
        batch_size=64,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        total_steps=12,
        kl_coef=0.02,
    )
    scores = [trainer.train_step()["objective/scores"] for _ in range(12)]
    assert scores[-1] > scores[0] + 0.5
