"""Every condition and reason that a PipelineJob can show, with its meaning; the documentation's source."""

from enum import StrEnum
from typing import Literal, NamedTuple, Self

ConditionStatus = Literal["True", "False", "Unknown"]


class _Meaningful(StrEnum):
    """An enum whose members are given as value and meaning."""

    def __new__(cls, value: str, meaning: str = "") -> Self:
        """Attach the meaning as the member's docstring."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.__doc__ = meaning
        return member


class ConditionType(_Meaningful):
    """The conditions of a PipelineJob; present from the operator's first visit where they apply."""

    ACCEPTED = "Accepted", "The spec can run; False names the field and the cure, and nothing runs."
    PLACED = "Placed", "Every stage pod of the present attempt exists and has a node."
    RUNNING = "Running", "Every stage is ready: the pipeline works on steps."
    SUSPENDED = "Suspended", "spec.suspend is set and no stage pod is left."
    CHECKPOINTED = (
        "Checkpointed",
        "The newest checkpoint is whole on the volume; False tells why one was not written or not used. Absent without "
        "spec.checkpoint.volumeClaimName.",
    )
    AVAILABLE = (
        "Available",
        "A client that asks now is answered: a front is ready, and a pipeline behind it. Only in mode Serve.",
    )
    PROTECTED = (
        "Protected",
        "The newest snapshot of every stage is in the memory of two pods; False tells why not. Present with recovery "
        "strategy Ladder.",
    )
    SUCCEEDED = "Succeeded", "Unknown while the job is active; True or False is final."


class Reason(_Meaningful):
    """Why a condition has its status."""

    # Accepted
    VALID = "Valid", "Every rule is met."
    TOO_FEW_LAYERS = (
        "TooFewLayers",
        "The model has fewer layers than all stages have chunks. Lower spec.stages or chunksPerStage, or give the "
        "model more layers.",
    )
    INVALID_TEMPLATE = (
        "InvalidTemplate",
        "spec.template sets something that belongs to the operator. The message names the field; remove it.",
    )
    INVALID_SPEC = (
        "InvalidSpec",
        "The spec breaks a rule that the API server could not check. The message names the field and what is allowed.",
    )
    CLAIM_ACCESS_MODE = (
        "ClaimAccessMode",
        "The checkpoint claim is ReadWriteOncePod, which one pod alone may mount. Use ReadWriteMany, or one stage.",
    )
    # Placed
    PLACED = "AllStagesPlaced", "Every stage pod has a node."
    CREATING = "Creating", "Stage pods are being created; none may start before all exist."
    SCHEDULING = "Scheduling", "All stage pods exist; kube-scheduler has not answered for all of them yet."
    HELD = (
        "Held",
        "Stage pods wait behind a scheduling gate that is not the operator's. The message names it; Kueue opens its "
        "own when the job's turn has come.",
    )
    SCHEDULER_MISSING = (
        "SchedulerMissing",
        "The API server does not serve the API of the scheduler of spec.placement.delegated. The message says what to "
        "install or to switch on.",
    )
    SCHEDULER_NOT_ALLOWED = (
        "SchedulerNotAllowed",
        "The operator has no rights to the PodGroups of the scheduler of spec.placement.delegated. Add it to the value "
        "schedulers of the chart.",
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        "kube-scheduler finds no node for a stage. The message holds its words; free or add capacity, or ask for less.",
    )
    NO_PLAN = (
        "NoPlanFits",
        "The stages do not all fit at once. The message says what is missing and where it came closest; free or add "
        "that, or ask for less. No stage holds a node meanwhile.",
    )
    WAITING_FOR_TURN = (
        "WaitingForTurn",
        "What is free is reserved for a job with a higher priority, or one that waits longer for more; the message "
        "names it.",
    )
    PROVISIONING = (
        "Provisioning",
        "No plan fits, so the stages wait unplanned for an autoscaler's nodes; they are taken back after "
        "spec.placement.provisionTimeoutSeconds.",
    )
    REPLANNING = (
        "Replanning",
        "A stage did not get the node that was planned for it; all are taken back and planned anew, for now without "
        "that node. The message says why.",
    )
    UNFIT_LEVELS = (
        "UnfitTopologyLevels",
        "No node has a label that spec.placement names as a level. The message has the levels that there are.",
    )
    VOLUME_CLAIM_NOT_FOUND = (
        "VolumeClaimNotFound",
        "The claim of spec.checkpoint.volumeClaimName does not exist. Create it; the job looks again by itself.",
    )
    QUOTA_EXCEEDED = (
        "QuotaExceeded",
        "A ResourceQuota refuses a stage pod; those that were created are released. Raise the quota or ask for less.",
    )
    LIMIT_RANGE_EXCEEDED = (
        "LimitRangeExceeded",
        "A LimitRange refuses a stage pod. Set resources of the container worker in spec.template within its limits.",
    )
    POD_SECURITY_VIOLATION = (
        "PodSecurityViolation",
        "The namespace's pod security level refuses a stage pod. Remove from spec.template what the message names.",
    )
    NAME_TAKEN = (
        "NameTaken",
        "An object with the name of one of the job's own exists and belongs to another owner. Delete it.",
    )
    POD_REFUSED = (
        "PodRefused",
        "The API server refuses a stage pod or another object of the job. The message holds its words.",
    )
    MODEL_JOB_NOT_FOUND = (
        "ModelJobNotFound",
        "The PipelineJob of spec.model.fromJob does not exist in the namespace. Create it; the job looks again by "
        "itself. What runs already goes on, but a lost stage is not replaced.",
    )
    MODEL_JOB_UNFIT = (
        "ModelJobUnfit",
        "The PipelineJob of spec.model.fromJob has no model that can be served; the message says why. Name another.",
    )
    MODEL_NOT_SAVED = (
        "ModelNotSaved",
        "The PipelineJob of spec.model.fromJob has no complete checkpoint yet. This job starts when it has.",
    )
    NOT_STARTED = "NotStarted", "Nothing has been created yet."
    # Running
    RUNNING = "AllStagesReady", "Every stage is ready."
    STARTING = "Starting", "Some stages are not ready yet."
    NOT_PLACED = "NotPlaced", "Some stages have no node yet; see the condition Placed."
    IMAGE_PULL_FAILED = (
        "ImagePullFailed",
        "A node cannot pull the image of a stage. Mend the image name, the registry, or imagePullSecrets.",
    )
    CONTAINER_CONFIG_ERROR = (
        "ContainerConfigError",
        "The kubelet cannot make the container of a stage, for instance because a Secret that it names is missing.",
    )
    FAILURE_SEEN = (
        "FailureSeen",
        "A stage lost a peer; the operator waits a few seconds for the cause to show.",
    )
    DRAINING = (
        "Draining",
        "A stage pod is being deleted by someone else, such as a node drain; the gang follows it.",
    )
    RECOVERING = (
        "Recovering",
        "A stage failed or left; it alone is started again or replaced, the others wait for it with their state.",
    )
    MOVING = (
        "Moving",
        "A stage pod was asked to leave, such as by a node drain; it hands over to a new pod, the others stay.",
    )
    RESCALING = (
        "Rescaling",
        "The stages train on while pods for another number of stages or pipelines come up, or hand over their layers.",
    )
    FEWER_STAGES = (
        "FewerStages",
        "There is no room for all stages, so the job goes on with fewer (spec.elasticity), and grows when there is.",
    )
    RESTARTING = "Restarting", "A stage failed; the whole gang is replaced after a back-off."
    REPLACING = (
        "Replacing",
        "The gang is replaced, not because of a failure: other stages or pipelines, a resume, or a drained node.",
    )
    # Available
    SERVING = "Serving", "At least one front and one pipeline are ready."
    FRONTS_NOT_READY = (
        "FrontsNotReady",
        "No front is ready: they start, wait for the model, or cannot run, for instance because the Secret with the "
        "bearer token is missing. kubectl describe pods -l pipelinejob.dev/front shows why.",
    )
    NO_PIPELINE_READY = (
        "NoPipelineReady",
        "Fronts are ready, but no pipeline is: accepted requests wait for it for up to limits.recoverySeconds.",
    )
    # Suspended
    NOT_SUSPENDED = "NotSuspended", "spec.suspend is not set."
    SUSPENDED = "Suspended", "spec.suspend is set and no stage pod is left."
    STOPPING = "Stopping", "The stage pods have been told to stop and are on their way out."
    # Checkpointed
    SAVED = "Saved", "The newest checkpoint is whole on the volume."
    NOT_SAVED_YET = "NotSavedYet", "No checkpoint has been written yet."
    CHECKPOINT_FAILED = (
        "CheckpointFailed",
        "A checkpoint could not be written, for instance because the volume is full or read-only. Training goes on, "
        "and the checkpoint before stays the newest; the message says what to mend.",
    )
    CHECKPOINT_DAMAGED = (
        "CheckpointDamaged",
        "A checkpoint on the volume is damaged, so the job went on from the one before. The message names the file.",
    )
    # Protected
    PROTECTED = "Protected", "The newest snapshot is in two places; the message says what a loss would cost."
    UNPROTECTED = (
        "Unprotected",
        "Training goes on, but the loss of a pod costs what the checkpoint costs. The message says what is needed and "
        "what is allowed.",
    )
    NOT_PROTECTED_YET = "NotProtectedYet", "No snapshot has been taken yet."
    WORKER_TOO_OLD = (
        "WorkerTooOld",
        "The worker image is of a release that cannot recover single stages; a failure restarts the whole gang. Use an "
        "image of the operator's release.",
    )
    # Succeeded
    ACTIVE = "Active", "The job has not finished."
    ALL_STAGES_SUCCEEDED = "AllStagesSucceeded", "Every stage ended with exit code 0."
    INVALID_CONFIGURATION = (
        "InvalidConfiguration",
        "A stage found the model, the data or the volume unfit for the job. Another try cannot help.",
    )
    RECOVERY_RULE = (
        "RecoveryRule",
        "A rule of spec.recovery.rules with action FailJob matched. The message names it and the failure.",
    )
    RESTART_BUDGET_SPENT = (
        "RestartBudgetSpent",
        "More failures than spec.recovery.maxRestarts within windowSeconds. The message names the first one.",
    )
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The job was active for longer than spec.activeDeadlineSeconds."
    # More than one
    FINISHED = "Finished", "The job has finished."
    NOT_ACCEPTED = "NotAccepted", "The spec is not accepted; see the condition Accepted."


class Verdict(NamedTuple):
    """What a rule found: why, in one word and in one line."""

    reason: Reason
    message: str
