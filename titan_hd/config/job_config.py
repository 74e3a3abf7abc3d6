"""The configuration as dataclasses. The string under each field is its documentation and its `--help` text.

Sections and keys follow torchtitan where it has them. Nothing here is checked against another key: single values are
checked by `manager`, combinations by `checks.check_combinations`, and whatever needs the model's shapes or the number
of workers by `titan_hd.preflight`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Job:
    dump_folder: str = "./outputs"
    """Where the run writes: metrics.jsonl, checkpoints, the exported model."""
    description: str = ""
    """Free text, kept in the logs and the experiment tracker."""
    print_config: bool = False
    """Print the resolved configuration at the start."""
    print_plan: bool = False
    """Print which ranks would hold what, how every weight's update would travel and what takes how much memory, with
    this configuration and number of workers, and stop. Needs neither GPUs nor weights. Every run writes the same to
    plan.txt in job.dump_folder."""
    dry_run: bool = False
    """Check whether the run would start (all keys, files, the tokenizer, every record, mesh, memory, the checkpoint to
    resume from), print what it would be, and stop: exit status 0 or 2. Starts no workers and needs no GPU; NGPU, and
    PET_NNODES for several nodes, say for how many workers. Tokens go to their cache, where the run finds them."""
    gpu_gib: float | None = None
    """GiB of one GPU as it is sold (24, 48, 80): job.print_plan and job.dry_run count for GPUs of this size. Not set:
    for what this machine has."""


@dataclass
class Model:
    hf_assets_path: str = ""
    """Directory in the Hugging Face layout: config.json, *.safetensors, tokenizer files."""
    name: str = ""
    """Model family (llama2, llama3, mistral, qwen2, qwen3, roberta, rwkv6, smollm2). Empty: read from config.json; if
    both are given they must agree."""
    flavor: str = ""
    """Size within the family (for example debugmodel, 8B). With a flavor the weights are random, and hf_assets_path
    serves for the tokenizer alone."""


@dataclass
class DataSource:
    """One entry of a list in data.train or data.validation; what it does not set is taken from [data]."""

    path: str = ""
    """As data.train."""
    name: str | None = None
    """Of data.validation only: a validation set of its own, for which the metrics are logged as validation_loss/NAME;
    the first set is the main one, whose metrics have no name. Letters, digits, _ and -; all entries have one or none.
    """
    weight: float | None = None
    """Of data.train only: every epoch takes round(weight * its records). Not set: 1, every record once."""
    samples: int | None = None
    """Of data.train only: every epoch takes exactly this many of its records. Give this or weight."""
    format: Literal["auto", "instruction", "chat", "text", "tokens", "classification"] | None = None
    """As data.format."""
    template: str | None = None
    """As data.template."""
    prompt_field: str | None = None
    """As data.prompt_field."""
    response_field: str | None = None
    """As data.response_field."""
    input_field: str | None = None
    """As data.input_field."""
    system_field: str | None = None
    """As data.system_field."""
    text_field: str | None = None
    """As data.text_field."""
    ignore_fields: list[str] | None = None
    """As data.ignore_fields."""


@dataclass
class Data:
    train: str | list[DataSource] = ""
    """Training records: a file, a directory or a glob, read in the order of names (JSONL, a JSON array or a .tsv,
    perhaps .gz or .zst, or Parquet), or org/name[:config][:split] of the Hub (needs the package datasets). Or a
    mixture: a list of paths or tables, [[data.train]] (on the command line as JSON), each with path, perhaps weight or
    samples, and perhaps format, template, ignore_fields and the names of fields instead of those of [data]. An epoch
    takes round(weight * records) of a source, each record equally often, or exactly `samples`; a partial pass goes on
    where the last epoch's ended, so the counts of two records never differ by more than one."""
    validation: str | list[DataSource] = ""
    """Validation records, as data.train; of a list all records are read, in its order. Tables with a `name` are sets of
    their own: [{name = "math", path = "..."}, {name = "plain", path = "...", format = "text"}]. The metrics of the
    first keep their names, those of every other one end in /NAME (validation_loss/plain)."""
    format: Literal["auto", "instruction", "chat", "text", "tokens", "classification"] = "auto"
    """instruction: a prompt and a response field. chat: messages [{role, content}, ...] or ShareGPT's conversations
    [{from, value}, ...], as the model's own chat template writes them; loss on every assistant turn and its end. text:
    one field, loss on all of it. tokens: {"input_ids": [...], "labels": [...]}, taken as they are. classification: one
    or two texts and a label, for a model with a classification head (RoBERTa). auto: by the fields of the first record,
    and for such a model classification; the log says what it found."""
    labels: list[str] = field(default_factory=list)
    """Format classification: the classes in the order of their numbers, as the records spell them (or they have the
    numbers). One name: the label is a number, a score, learned by the squared error. Empty: what config.json says
    (id2label), else two classes, 0 and 1. The names that a trained head has there must stand in its order; for another
    number of names a new head is drawn."""
    prompt_field: str = ""
    """Field with the prompt. Empty: the first of instruction, query, question, prompt that the first record has. Of
    format classification the first text, prompt_field, the second one, input_field, and the label, response_field, are
    looked for under the names that GLUE's files have."""
    response_field: str = ""
    """Field with the response. Empty: the first of output, response, answer, completion that the first record has."""
    input_field: str = ""
    """Field with what a prompt is about, which a record may have. Empty: input, or context."""
    system_field: str = ""
    """Field with a system text, which a record of format instruction or chat may have. Empty: system, or system_prompt.
    Templates alpaca and pissa write it in place of their heading, none in front of the prompt, a file where it has
    {system}; chats begin with it."""
    text_field: str = "text"
    """Field with the text of format text."""
    ignore_fields: list[str] = field(default_factory=list)
    """Fields of records that are passed over as if they were not there. What else a data set has and a run does not use
    is named once in the log."""
    train_on_prompt: bool = False
    """Loss on all tokens of a record, not on responses and assistant turns alone (formats instruction and chat)."""
    template: str = "pissa"
    """How a prompt is written: alpaca, pissa, none, or the path of a text file that holds {prompt} (and may hold
    {input} and {system}); the response follows it, and an end-of-sequence token. chat: the model's own chat template,
    with the prompt as the user's turn and the response as the assistant's; nothing is added to what it writes. Records
    of format chat are always written by the model's own."""
    encoding: Literal["apart", "joint"] = "apart"
    """How a prompt and its response become tokens. apart: so that the tokens that generation starts from, those of the
    prompt alone, begin the record, and every letter of the response is trained. joint: as one text, as Alpaca's and
    PiSSA's scripts do; with vocabularies of the Llama 3 and Qwen kind many responses then share their first token with
    the prompt's last, and it is not trained. The log says for how many records that makes a difference; the others are
    the same either way."""
    parse_control_tokens: bool = False
    """Format text: control tokens that a text spells (<|im_start|>, as in a chat that was rendered beforehand) become
    these tokens; they are letters otherwise. BOS and EOS are added where the text does not bring them."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record does (invalid JSON, a wrong type, an empty response, ...). raise: end the run, naming file and
    line. skip: leave it out; the log says how many there were, and the first."""
    max_skipped: int = 100
    """The most bad records of a data set that data.on_error = "skip" leaves out; one more ends the run."""
    shuffle: bool = True
    """Permute the records anew in every epoch, as a function of (training.seed, epoch) alone."""
    pack: bool = False
    """Pack training records into rows of training.seq_len tokens. Records of a row do not see each other, and the loss
    is that of the same records unpacked; a row counts as one record for training.local_batch_size, global_batch_size
    and epochs."""
    num_workers: int = 0
    """Processes per worker that read training batches ahead. 0: none, which is enough unless reading a record is slow;
    docs/benchmarks.md has figures."""
    num_proc: int = 0
    """Processes that tokenize on a node. 0: one for each core (at most 32); without a cache, of each worker's share of
    the cores."""
    cache_dir: str = "auto"
    """Folder in which tokenized records are kept between runs and shared by the workers, keyed by the content of data
    and tokenizer and by these settings. auto: titan_hd/tokens in $XDG_CACHE_HOME or ~/.cache. Empty: none, every worker
    tokenizes all records and holds them in memory (as it always does with less than 1 MiB of data)."""
    streaming: bool = False
    """Tokenize nothing ahead: every worker reads through the files and encodes the records of its own batches. Needs
    training.steps. Sample j of the run is record j of the files, which begin anew at their end; a bad record
    (data.on_error = "skip", counted for each worker) or one without a label is a sample without loss."""
    shuffle_window: int = 10000
    """With data.streaming: data.shuffle permutes records within stretches of so many, whose text is held in memory."""


@dataclass
class Training:
    steps: int | None = None
    """Number of optimizer steps. Give this or training.epochs."""
    epochs: float | None = None
    """Number of passes over the training records; the incomplete global batch at the end of the run is left out (but a
    run has at least one step)."""
    seq_len: int = 2048
    """Longest sequence in tokens; longer records are cut at the right."""
    local_batch_size: int = 1
    """Records per micro-batch of one worker."""
    global_batch_size: int = -1
    """Records per optimizer step over all workers. -1: one micro-batch per logical adapter and worker."""
    max_norm: float = 0.0
    """Clip gradients to this global norm (over all logical adapters). 0: off."""
    seed: int = 42
    """Seeds the data order, random weights, random slices and dropout."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype in which the weights are all-gathered and computed with. auto: bfloat16 on GPUs and CPUs that have
    units or instructions for it (GPUs from compute capability 8.0 on), else float32."""
    float32_matmul_precision: Literal["high", "highest"] = "highest"
    """How GPUs multiply fp32 matrices (torch.set_float32_matmul_precision). high: TF32, several times faster, with 10
    bits of mantissa in the factors; where mixed_precision_param is bfloat16 it matters to the fold's products alone.
    highest: fp32."""
    master_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the sharded master weights. The 16-bit ones halve their memory. For hdpissa the fold rounds to bfloat16
    stochastically, because an update of relative size 1e-5 would vanish; methods with adapters beside a frozen W keep
    those in float32; full needs float32, and float16 is for frozen weights alone. auto: that of the files, where W is
    frozen as they have it (not for pissa and OLoRA), all of them are bfloat16 or all are float16, and
    training.mixed_precision_param is bfloat16: nothing is lost. Else float32, but for those weights that the
    method leaves alone (embedding, head, norms). A run that resumes keeps its checkpoint's."""
    enable_cpu_offload: bool = False
    """Hold the shards of the weights in the host's memory, with the gradients and the optimizer's state of those that
    are trained by themselves (all methods but hdpissa). They pass over the bus for every gather, and the fold takes one
    weight at a time; docs/memory.md says what is freed, and what that costs."""
    gc_freq: int = 50
    """Python garbage is collected every this many steps, by all workers at once."""


@dataclass
class Optimizer:
    name: str = "AdamW"
    """A class of torch.optim (AdamW, Adam, SGD, ...)."""
    lr: float = 2e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """Adam's beta1."""
    beta2: float = 0.999
    """Adam's beta2."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Weight decay on the trained weights, as the optimizer defines it; for hdpissa decoupled, on W at the fold."""


@dataclass
class LRScheduler:
    warmup_steps: int | None = None
    """Steps of linear warm-up; the first step already has a learning rate above zero."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all steps. Give this or lr_scheduler.warmup_steps."""
    decay_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    min_lr_factor: float = 0.0
    """The learning rate ends at this share of optimizer.lr."""


@dataclass
class Adapter:
    method: Literal["hdpissa", "full", "lora", "pissa", "dora", "mora", "hira", "bone", "miss", "bat"] = "hdpissa"
    """How the model is trained; docs/methods.md says what each one is. miss is another name of bone."""
    rank: int = 16
    """Rank r of one adapter; for bone and bat the size b of a block; mora has as many parameters as lora of this
    rank."""
    alpha: float | None = None
    """The adapter (for hdpissa: its gradients) is scaled by alpha / rank (a real number). Not set: alpha = rank."""
    rslora: bool = False
    """rsLoRA: scale by alpha / sqrt(rank) instead (lora, pissa, dora)."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: the learning rate of lora_B is optimizer.lr times this (lora, pissa, dora)."""
    init: Literal["default", "olora"] = "default"
    """How the tensors of method lora start. default: A random, B zero. olora: from the QR decomposition of W, which is
    taken out of the base weight."""
    dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: list[str] | None = None
    """Linear layers to train, by the end of their HF name: the last part, or more of it (key, attention.key). Not set:
    all linear layers of the blocks; for method full: every weight of the model."""
    svd: Literal["auto", "exact", "randomized"] = "auto"
    """Algorithm for the principal directions (hdpissa, pissa). exact: a full decomposition. randomized: subspace
    iteration for the K*r (pissa: r) leading ones. auto: randomized where it is much cheaper (see docs/svd.md), else
    exact."""
    svd_niter: int = 16
    """Power iterations of the randomized algorithm; 16 leave an error of about 1e-3 in the product B A, see
    docs/svd.md."""
    svd_cache: str = ""
    """Folder in which principal factors are kept between runs, keyed by the weights' content and these settings.
    Empty: none."""
    mora_type: Literal[1, 6] = 6
    """How mora maps a layer's input to its square matrix. 1: blocks are summed, for large ranks. 6: blocks are
    rotated, for small ranks."""
    bat_form: Literal["column", "row"] = "column"
    """bat's square blocks: column (PEFT's) has one for each row block of a weight, row one for each column block."""

    @property
    def effective_alpha(self) -> float:
        """alpha with its default."""
        return self.rank if self.alpha is None else self.alpha


@dataclass
class HDPissa:
    num_adapters: int = 0
    """K, the number of logical adapters (each trains another slice). 0: the number of data-parallel workers."""
    aggregate: Literal["mean", "sum"] = "mean"
    """How the updates of the shares of the global batch are combined: mean is the paper's equation, sum its published
    script. With hdpissa.samples = "all" there is one share, and both are the sum of the adapters' updates."""
    slices: Literal["orthogonal", "top", "random", "minor"] = "orthogonal"
    """orthogonal: adapter i takes singular directions i*r to (i+1)*r. minor: the same, counted from the smallest
    singular value. top: every adapter the first r. random: LoRA's initialisation with direct weight updates. The last
    two are the paper's ablations."""
    factor_scale: Literal["root", "unit"] = "root"
    """root: A and B carry the roots of the singular values, as in the paper. unit: they are orthonormal, times the mean
    of the roots over the directions that a weight's adapters take, so that Adam moves all directions alike."""
    samples: Literal["own", "all"] = "own"
    """What an adapter learns from. own: its share of the global batch, as in the paper. all: every sample; K then says
    over how many holders the K*r directions are dealt, and a run trains as K = 1 with rank K*r does."""
    refresh_steps: int = 0
    """T: every T steps the slices are taken from the weights as they are then, and the optimizer's moments begin anew.
    Costs the start's decompositions each time (refresh_seconds in the metrics). 0: the slices of the start stay, as in
    the paper."""
    local_steps: int = 1
    """L: dA and dB stay in the forward pass for L optimizer steps before they are exchanged and folded into the
    weights, so that 1/L of the bytes travel. In between each adapter learns at the weights with its own dA and dB;
    validation and the weights of a checkpoint are those of the last fold (docs/methods.md). The last step of a run
    folds too. 1: every step folds, as in the paper."""
    mute_scalar: float = 0.0
    """0: exact mute (the limit, no extra forward work). Otherwise the paper's scalar g in Y = X(W + g A B)."""
    exchange: Literal["auto", "factors", "dense"] = "auto"
    """How the updates travel to the shards of W: factors sends dA and dB, dense reduce-scatters whole updates, auto
    takes for each weight the one that moves fewer bytes (job.print_plan shows the choice)."""
    exchange_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """dtype in which updates travel. bfloat16 halves the bytes and rounds dA and dB (the dense route: partial sums, so
    that its result depends on the number of workers in the last bits). int8 quarters them, on the factors route: rows
    of dA and columns of dB are rounded to 127 steps of their largest element, and what is left is added to the next
    step's, so that nothing is lost over the steps (docs/methods.md)."""
    factor_cache_gb: float | None = None
    """Memory per worker, in GiB, for the static factors of all adapters; what does not fit travels in every step.
    Not set: 2 GiB, or as much as the worker's shards of the adapted weights if that is more."""
    offload_moments: bool = False
    """Hold the optimizer's moments of dA and dB in the host's memory; each step takes them to the GPU and back, a part
    at a time. Frees twice the memory of dA and dB, which matters where a GPU hosts several adapters or their rank is
    high (docs/memory.md)."""
    exchange_in_flight: int = 2
    """Buckets of the exchange that are under way at the same time. 1: no overlap."""


@dataclass
class Parallelism:
    data_parallel_replicate_degree: int = 1
    """Replicas of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = -1
    """Shards of the model (FSDP). -1: all workers that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """When the gathered weights are freed. always: after each block's forward pass, and gathered again for its backward
    pass. never: after the last backward pass of an optimizer step, so that each is gathered once a step; takes the
    memory of all weights in mixed_precision_param. default: never where a step has several micro-batches and the memory
    left by the first step suffices (the log says what was decided), else always."""
    tensor_parallel_degree: int = 1
    """Ranks that split each linear layer of the blocks (tensor parallelism), within a node."""
    sequence_parallel: bool = True
    """With tensor parallelism: split the sequence between attention and MLP, so that norms and the activations that
    are kept there are shared out; as many bytes travel (docs/meshes.md)."""
    loss_parallel: bool = True
    """With tensor parallelism: split embedding, head and loss by the vocabulary, which the degree must divide; no rank
    then holds whole logits. false: whole on every tensor-parallel rank."""
    context_parallel_degree: int = 1
    """Ranks that split the sequence of attention itself. Only 1: docs/meshes.md says what to use for long sequences."""


@dataclass
class ActivationCheckpoint:
    mode: Literal["none", "selective", "full"] = "none"
    """none: keep all activations. full: recompute each block. selective: keep the residual stream, attention's result
    and what activation_checkpoint.keep names, recompute the rest."""
    keep: list[Literal["qkv", "gate_up"]] = field(default_factory=lambda: ["qkv", "gate_up"])
    """What selective keeps besides. qkv: queries, keys and values. gate_up: the outputs of gate_proj and up_proj. The
    default computes no matrix product twice; [] keeps the least. docs/performance.md has the memory of each choice."""


@dataclass
class Compile:
    enable: bool = False
    """torch.compile each block (fullgraph, static shapes); records are then padded to one of at most eight lengths,
    packs to seq_len. Validation and generation are not compiled."""


@dataclass
class Profiling:
    enable_profiling: bool = False
    """Write traces of torch.profiler, and a table of what took how long beside each; docs/profiling.md."""
    profile_freq: int = 10
    """Steps between two traces."""
    profile_steps: list[int] = field(default_factory=list)
    """The steps to trace, counted from 1, in place of one every profile_freq; steps that follow each other are one
    trace."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """The workers that write traces, and memory snapshots of memory_snapshot_steps."""
    with_stack: bool = False
    """Traces have the lines of Python that called an operation; they are larger, and the steps slower."""
    save_traces_folder: str = "profile_traces"
    """Folder of the traces inside job.dump_folder."""
    enable_nvtx: bool = False
    """Name the parts of a step for Nsight Systems, too. Needs a GPU."""
    enable_memory_snapshot: bool = False
    """Record a GPU's allocations. A worker writes them down when it gets SIGUSR2, after memory_snapshot_steps, and
    where its memory runs out."""
    memory_snapshot_steps: list[int] = field(default_factory=list)
    """The steps, counted from 1, after which the workers of profile_ranks write a memory snapshot."""
    save_memory_snapshot_folder: str = "memory_snapshots"
    """Folder of the memory snapshots inside job.dump_folder."""


@dataclass
class Comm:
    init_timeout_seconds: int = 1800
    """Time-out of collectives until the first step is done (loading, SVD, compilation)."""
    train_timeout_seconds: int = 300
    """Time-out of collectives after the first step."""
    save_timeout_seconds: int = 1800
    """Time-out of collectives by which a checkpoint is checked, read and written, at the start as well: how long ranks
    wait for the one with the slowest disk."""
    export_timeout_seconds: int = 1800
    """Time-out of collectives after the last step, of the export: how long ranks wait for the one with the slowest
    disk."""


@dataclass
class Checkpoint:
    enable: bool = False
    """Save checkpoints, and resume from the latest one at the start."""
    folder: str = "checkpoint"
    """Folder of the checkpoints inside job.dump_folder. Or the URL of an object store, s3://bucket/run (pip install
    "titan_hd[remote]")."""
    interval: int = 500
    """Steps between two checkpoints; the last step is always saved, and the one at which a signal stops the run."""
    keep_latest_k: int = 2
    """Checkpoints to keep, and those of a run that was left behind. 0: all."""
    keep_best: str = ""
    """Metric of the validation by which the best checkpoint is kept beside the latest ones: validation_loss (the least
    is best), validation_exact_match (the most), or those of another named set (validation_loss/NAME). Every validation
    that is the best so far saves a checkpoint; best.json beside them names it. The export is of the last step all the
    same; docs/checkpoints.md says how to export the best. Empty: off."""
    load_step: int = -1
    """Step to resume from. -1: the latest whose files are whole; 0: do not resume."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: a save stops the training only while the shards are copied to the host (which takes as much memory there);
    a thread writes them. One save is under way at a time. disabled: training waits for the disk."""
    base: Literal["auto", "full", "delta"] = "auto"
    """full: a checkpoint holds every weight. delta: only those that training changes; the others are read again from
    model.hf_assets_path, which must then hold the same files. auto: delta where a method trains adapters beside the
    frozen weights of model.hf_assets_path, else full; a run that resumes keeps its checkpoint's."""
    allow_mismatch: list[str] = field(default_factory=list)
    """Keys in which a run may differ from the checkpoint that it resumes from, for example data.train (see
    docs/checkpoints.md for those that can)."""


@dataclass
class Export:
    enable: bool = False
    """Write the final model, or its adapters."""
    format: Literal["hf", "peft"] = "hf"
    """hf: the model as a Hugging Face directory, adapters merged. peft: the adapters alone, as the peft library loads
    them onto the base model (lora, pissa, dora, hira, bone, bat); pissa and OLoRA become LoRA of rank 2r."""
    folder: str = "hf"
    """Folder of what is exported inside job.dump_folder."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the exported weights of format hf; adapters are written in float32."""
    max_shard_size_gb: float = 5.0
    """Largest size of an exported file in GB (10^9 bytes); a tensor that is larger gets a file of its own."""


@dataclass
class Metrics:
    log_freq: int = 1
    """Steps between two log lines and records in metrics.jsonl."""
    update_freq: int = 0
    """Steps between two measurements of what training does to the weights: the size of the update and of all change by
    kind of layer, its effective rank, how much of it is in HD-PiSSA's initial directions, and the gradient of every
    logical adapter; in records of their own (docs/metrics.md has their cost). The last step is measured, too. 0: off.
    """
    update_vectors: int = 32
    """Random vectors by whose products with the weights that is estimated: more are more exact, and cost more."""
    progress_bar: bool = True
    """Show progress as bars when the standard error is a terminal, of the run and of whatever takes long. Elsewhere,
    and with false, long phases say in a line now and then how far they are."""
    trackers: list[str] = field(default_factory=list)
    """Where the metrics go besides metrics.jsonl and the console: tensorboard, wandb (the same as the two keys below),
    or a class of yours as package.module:Class (docs/metrics.md). An outage of one never stops the training."""
    enable_tensorboard: bool = False
    """Write TensorBoard events to job.dump_folder/tb (needs the tensorboard package)."""
    enable_wandb: bool = False
    """Log to Weights & Biases; WANDB_MODE=offline works, and an outage never stops the training."""
    wandb_project: str = "titan_hd"
    """wandb project."""
    wandb_entity: str = ""
    """wandb entity; empty: the account's default."""
    wandb_name: str = ""
    """wandb run name; empty: chosen by wandb."""
    wandb_group: str = ""
    """wandb group."""


@dataclass
class Validation:
    enable: bool = False
    """Validate on data.validation before the first step, every freq steps and at the end."""
    freq: int = 100
    """Steps between two validations."""
    patience: int = 0
    """Early stopping: end the run, with its last checkpoint and its export, after so many validations in a row without
    gain of checkpoint.keep_best (if that is empty, of validation_loss). With hdpissa.local_steps, freq
    must be a multiple of it. 0: off."""
    steps: int = -1
    """Batches per worker and validation. -1: every record."""
    batch_size: int = 0
    """Records per worker and batch of a validation. 0: training.local_batch_size. There is no backward pass, so it may
    be larger."""
    exact_match_samples: int = 0
    """Records to answer by greedy generation, scored by exact match of the final answer; of further named sets those
    whose responses have a marker. 0: off."""
    samples: int = -1
    """Records of each set whose prompt, reference and generated answer go into validation_samples.jsonl and the
    trackers' tables at every validation. -1: the first 4 of those that exact_match_samples answers, at no cost; more
    than it answers are generated for the table alone. 0: none."""
    answer_marker: str = "The answer is: "
    """The final answer is the text after the last of these markers, up to the end of its line."""
    max_new_tokens: int = 64
    """Longest generated answer in tokens."""


@dataclass
class Debug:
    deterministic: bool = False
    """Deterministic kernels only (torch.use_deterministic_algorithms)."""


@dataclass
class JobConfig:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    adapter: Adapter = field(default_factory=Adapter)
    hdpissa: HDPissa = field(default_factory=HDPissa)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    export: Export = field(default_factory=Export)
    metrics: Metrics = field(default_factory=Metrics)
    validation: Validation = field(default_factory=Validation)
    debug: Debug = field(default_factory=Debug)
