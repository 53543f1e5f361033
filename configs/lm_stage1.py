"""The language stage, first part: a projector learns to put slides into the words of a frozen decoder.

Command    pathflip train --config lm_stage1 --config.data.records=RECORDS --config.data.slides=SLIDES.csv \\
               --config.data.texts="reports.jsonl,vqa.csv*2" --config.lm.aligner=runs/base \\
               --config.lm.decoder=Qwen3-0.6B --workdir runs/lm1
Hardware   not run at scale yet
Hours      not measured
Result     not measured

Learning rate of the follow-up's first stage (1e-3). This file lists every setting of the language stage; a config that
names another one is refused. `lm_stage1:smoke` shrinks the batch and runs four steps.
"""

from ml_collections import ConfigDict


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict()

    config.data = ConfigDict()
    config.data.records = ""  # folder of records; gs:// and s3:// too
    # Tables of reports, questions and conversations, with commas between them; "*N": seen N times in an epoch.
    config.data.texts = ""
    config.data.slides = ""  # slide table with split train|val|test; without one, all slides train and none validate
    # File of `pathflip embed RECORDS --checkpoint ALIGNER --regions`: slides are then not embedded in every step, and
    # no feature is read. Not where the aligner learns.
    config.data.embeddings = ""
    config.data.split = "train"
    config.data.val_split = "val"  # "": no validation
    config.data.regions = 24  # drawn per slide and step
    config.data.patch_slots = 0  # patches of a region; 0: as many as a full region holds
    config.data.length = 0  # tokens of a sequence, its slide among them; 0: as the longest needs
    config.data.template = ""  # "chat" (of the decoder's tokenizer), "plain" (the paper's); "": chat where there is one
    config.data.no_slide_share = 0.0  # of the examples are shown without a slide, so that the text-only score is fair
    config.data.sentence_orders = 1  # of a report that are learnt; above 1 for cohorts so small that they are memorised
    config.data.threads = 16  # reading ahead
    config.data.resident = ""  # read features once: "host" keeps them in memory, "device" on the devices

    config.lm = ConfigDict()
    config.lm.aligner = ""  # run folder of alignment, which embeds slides and regions
    config.lm.decoder = ""  # Hugging Face folder: Qwen3, Qwen2 or Llama 3; published: Qwen3-0.6B
    config.lm.start = ""  # run of an earlier language stage, whose projector and LoRA this one goes on with, or PEFT's
    config.lm.trains = "projector"  # of projector, lora, decoder, aligner, with commas
    config.lm.random_decoder = False  # start a decoder from scratch: the folder then needs no weights
    config.lm.dtype = "bfloat16"  # that the frozen decoder is stored in; what learns is float32
    config.lm.compute_dtype = "bfloat16"
    config.lm.remat = True  # compute the decoder's layers again for the gradient
    config.lm.lora_rank = 16
    config.lm.lora_alpha = 32.0
    config.lm.lora_dropout = 0.05
    config.lm.lora_targets = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"

    config.optim = ConfigDict()
    config.optim.preset = "ours"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.optim.warmup_learning_rate = 1e-6
    config.optim.final_learning_rate = 0.0
    config.optim.weight_decay = 0.0
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip = 1.0  # global norm; 0: none

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that the others leave
    config.mesh.fsdp = 1  # devices that share one copy of the parameters
    config.mesh.region = 1  # devices that share the regions of a slide

    config.train = ConfigDict()
    config.train.batch_size = 32  # conversations per step over all devices
    config.train.accumulate = 1  # microbatches of a step; the same gradient
    config.train.epochs = 1
    config.train.steps = 0  # above 0: counts instead of epochs
    config.train.seed = 0
    config.train.eval_every = 500
    config.train.save_every = 500
    config.train.keep = 3  # checkpoints kept besides the best
    config.train.keep_every = 0  # those of every so many steps are kept for good; 0: none
    config.train.preemptions_per_day = 0.0  # stops a day to reckon with: a save_every is recommended; 0: not stated
    config.train.deterministic = False  # the same bits from run to run on GPUs too, slower there
    config.train.wandb_project = ""  # Weights & Biases project that gets the metrics too (extra [wandb]); "": none
    config.train.hang_seconds = 1800  # without progress, compilation aside: exit with 75 and say where; 0: never
    config.train.heartbeat_seconds = 60  # without a sign of a host: it is lost, and the others exit with 75
    config.train.checkpoints = ""  # local folder or gs://bucket/run that they go to; "": the workdir, with the logs
    config.train.select = "val/loss"  # decides the best
    config.train.select_margin = 0.0  # the best is the latest within this of the top

    return adapt(config, argument)


def adapt(config: ConfigDict, argument: str) -> ConfigDict:
    """Apply what stands after the colon of --config: nothing, or `smoke`, which shrinks everything."""
    if argument == "smoke":
        config.data.update(regions=4, patch_slots=16, threads=2)
        config.lm.update(dtype="float32", compute_dtype="float32", remat=False)
        config.train.update(batch_size=4, accumulate=1, steps=4, eval_every=2, save_every=2)
        config.optim.warmup_steps = 2
    elif argument:
        raise ValueError(f"a config takes the argument 'smoke' or none, not {argument!r}")
    return config
