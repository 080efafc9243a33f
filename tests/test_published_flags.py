"""Every flag of the published programs is taken, or refused by name with what to do instead.

Flags and values as the published programs have them, copied once.
"""

import pytest

from neon.cli.command_line import parse, run_program
from tests.test_help import program

TAKEN: dict[str, str] = {
    "edm/finetune.py": "--outdir=runs --data=set.zip --cond=1 --arch=ddpmpp --precond=edm --duration=6 --batch=512 "
    "--batch-gpu=64 --cbase=128 --cres=1,2,2,2 --lr=1e-4 --ema=0.5 --dropout=0.13 --augment=0.12 --fp16=0 --ls=1 "
    "--tick=50 --snap=10 --seed=1 --transfer=base.pkl",
    "edm/sample.py": "--network=base.pkl --outdir=out --seeds=0-63 --class=1 --batch=64 --steps=18 --sigma_min=0.002 "
    "--sigma_max=80 --rho=7 --S_churn=0 --S_min=0 --S_max=inf --S_noise=1 --solver=heun --disc=edm --schedule=linear "
    "--scaling=none",
    "edm/calculate_fid.py": "--network_pkl=base.pkl --ref=real.npz --seeds=0-49999 --max_batch_size=64 --class=1 "
    "--num_steps=18 --sigma_min=0.002 --sigma_max=80 --rho=7 --s_churn=0 --s_min=0 --s_max=inf --s_noise=1 "
    "--nearest_k=5",
    "VAR/calculate_fid.py": "--N=50000 --batch_size=128 --model_depth=16 --cfg=2.9 --top_k=900 --top_p=0.95 "
    "--more_smooth --seed=0 --fid_stats=real.npz --var_ckpt=var.pth --vae_ckpt=vae.pth --w=1.5",
    "VAR/sample.py": "--var_ckpt=var.pth --out_dir=out --num_images=750 --batch_size=64 --cfg=4.0 --top_k=900 "
    "--top_p=0.95 --more_smooth --model_depth=16 --seed=0",
    "VAR/finetune.py": "--data_path=set --outdir=runs --depth=16 --target_lr=1e-5 --save_interval=250000 "
    "--total_images=7500000 --bs=768 --saln=1 --mid_reso=1.125 --seed=0",
    "xAR/calculate_fid.py": "--model=xar_base --model_ckpt=base.pth --cfg=2.7 --vae_path=vae.ckpt --num_images=50000 "
    "--batch_size=64 --flow_steps=64 --img_size=256 --device=cuda --fid_stats=real.npz --seed=1",
    "xAR/sample.py": "--model=xar_base --model_ckpt=base.pth --vae_path=vae.ckpt --out_dir=out --num_images=50000 "
    "--batch_size=64 --flow_steps=64 --img_size=256 --cfg=1.0 --device=cuda",
    "xAR/finetune.py": "--data_path=set --output_dir=runs --model=xar_large --img_size=256 --vae_path=kl16.ckpt "
    "--lr=1e-6 --weight_decay=0.02 --warmup_epochs=100 --ema_rate=0.9999 --grad_clip=1.0 --attn_dropout=0.1 "
    "--proj_dropout=0.1 "
    "--save_img_interval=250000 --device=cuda --seed=1",
    "imm/calculate_fid.py": "--network_pkl=base.pkl --fid_stats=real.npz --num_steps=8 --cfg_scale=1.8 "
    "--preset=8_steps_cfg1.5_pushforward_uniform --batch_size=256",
    "imm/sample.py": "--network_pkl=base.pkl --outdir=out --per_class_count=30 --cfg_scale=1.5 --batch_size=256",
}
"""flags with their values, all at once"""

REFUSED: dict[str, str] = {
    "edm/finetune.py": "xflip bench cache desc nosubdir dump resume dry-run",
    "edm/sample.py": "subdirs",
    "edm/calculate_fid.py": "network_pkl_base network_pkl_aux_dir network_pkl_aux_file differential_weights out_dir "
    "max_training_step seeds_test real_data_dir gen_dir feat_batch_size feat_num_workers cf_mode cf_model "
    "poll_timeout_sec",
    "VAR/calculate_fid.py": "temp_dir cuda var_aux out_dir",
    "VAR/sample.py": "temp_dir cuda",
    "VAR/finetune.py": "exp_name ini hd aln alng fp16 tblr tlr twd twde tclip ls resume ac ep wp wp0 wpe sche opt "
    "afuse anorm fuse pn patch_size hflip pg pg0 pgwp local_out_dir_path same_seed_for_all_ranks "
    "vfast tfast",
    "xAR/calculate_fid.py": "class_num no_isc cuda dist_url world_size local_rank dist_on_itp out_dir model_ckpt_aux",
    "xAR/sample.py": "class_num class_map",
    "xAR/finetune.py": "batch_size epochs vae_embed_dim vae_stride patch_size label_drop_prob blr min_lr lr_schedule "
    "class_num resume start_epoch pin_mem use_cached cached_path num_iter num_images cfg cfg_schedule "
    "eval_freq save_last_freq epoch_save_freq online_eval evaluate eval_bsz",
    "imm/calculate_fid.py": "config-name",
    "imm/sample.py": "config-name",
    "imm/finetune.py": "config-name resume transfer ngpus nodes port partition comment",
    "imm/encode.py": "source dest model-url max-images transform resolution",
}
"""flags by their names"""


@pytest.mark.parametrize("name", TAKEN)
def test_published_flags_are_taken(name: str) -> None:
    parse(program(name), TAKEN[name].split(), name)


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name, flags in REFUSED.items() for flag in flags.split()])
def test_a_published_flag_without_a_place_is_refused_by_name(
    name: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(program(name), [f"--{flag}=1"], name=name) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: --{flag}: ")
    assert len(line) > len(f"{name}: --{flag}: ") + 10, "it says what to do"


def test_the_short_spelling_of_a_dry_run_is_refused_as_the_long_one(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-n", "--dry-run", "--dry_run"):
        assert run_program(program("edm/finetune.py"), [flag], name="edm/finetune.py") == 2
        assert capsys.readouterr().err.startswith(f"edm/finetune.py: {flag}: what is wrong with a request is said ")


def test_an_override_of_a_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(program("imm/sample.py"), ["+per_class_count=30"], name="imm/sample.py") == 2
    assert "+per_class_count: there are no configuration files" in capsys.readouterr().err


def test_published_lists_of_numbers_are_taken_with_commas_or_without() -> None:
    both = [
        parse(program("edm/finetune.py"), f"--data d --outdir o --cres {spelled}".split(), "edm/finetune.py")
        for spelled in ("1,2,2,2", "1 2 2 2")
    ]
    assert both[0] == both[1]


def test_a_value_of_another_flag_keeps_its_commas() -> None:
    command = parse(
        program("edm/sample.py"), ["--network_pkl", "a", "--outdir", "b", "--seeds", "1,2,5-10"], "edm/sample.py"
    )
    assert command.seeds == "1,2,5-10"  # type: ignore[attr-defined]
