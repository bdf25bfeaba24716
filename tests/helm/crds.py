"""Fields of the custom resources that the chart makes, strictly: what is not listed is a mistake.

RayCluster as KubeRay's API reference has it (ray.io/v1; https://docs.ray.io/en/latest/cluster/kubernetes/references),
ServiceMonitor and PodMonitor as the Prometheus operator's, ScaledObject as KEDA's, each with the fields that could
sensibly be used here. Templates of pods are checked by Kubernetes' own schema instead.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
ANY: Schema = {"type": "object"}


def fields(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


_CREDENTIAL = fields(value=TEXT, valueFrom=ANY)
_AUTOSCALER = fields(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=WHOLE,
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=ANY,
    env=listed(ANY),
    envFrom=listed(ANY),
    volumeMounts=listed(ANY),
    securityContext=ANY,
)
_HEAD = fields(
    ("rayStartParams", "template"),
    rayStartParams=TEXTS,
    template=ANY,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    headService=ANY,
    enableIngress=FLAG,
)
_GROUP = fields(
    ("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=WHOLE,
    idleTimeoutSeconds=WHOLE,
    suspend=FLAG,
    rayStartParams=TEXTS,
    scaleStrategy=fields(workersToDelete=listed(TEXT)),
    template=ANY,
)
_RAY = fields(
    ("headGroupSpec",),
    rayVersion=TEXT,
    suspend=FLAG,
    managedBy=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions=fields(
        ("redisAddress",),
        redisAddress=TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=TEXT,
    ),
    headGroupSpec=_HEAD,
    workerGroupSpecs=listed(_GROUP),
)

_SECRET_KEY = fields(("name", "key"), name={"type": "string", "minLength": 1}, key={"type": "string", "minLength": 1})
_ENDPOINT = {
    "port": TEXT,
    "path": TEXT,
    "interval": TEXT,
    "scheme": {"enum": ["http", "https"]},
    "authorization": fields(type=TEXT, credentials=_SECRET_KEY),
    "tlsConfig": fields(serverName=TEXT, ca=fields(secret=_SECRET_KEY)),
    "relabelings": listed(
        fields(sourceLabels=listed(TEXT), targetLabel=TEXT, regex=TEXT, replacement=TEXT, action=TEXT)
    ),
}
_SELECTOR = fields(matchLabels=TEXTS)
_KEDA_TRIGGER = fields(
    ("type", "metadata"),
    type={"const": "prometheus"},
    metadata=fields(("serverAddress", "query", "threshold"), serverAddress=TEXT, query=TEXT, threshold=TEXT),
)

SPECS: dict[tuple[str, str], Schema] = {
    ("ray.io/v1", "RayCluster"): _RAY,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): fields(
        ("selector", "endpoints"), selector=_SELECTOR, endpoints=listed(fields(("port",), **_ENDPOINT))
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): fields(
        ("selector", "podMetricsEndpoints"),
        selector=_SELECTOR,
        podMetricsEndpoints=listed(fields(("port",), **_ENDPOINT)),
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): fields(
        ("scaleTargetRef", "triggers"),
        scaleTargetRef=fields(("name",), apiVersion=TEXT, kind=TEXT, name={"type": "string", "minLength": 1}),
        minReplicaCount=WHOLE,
        maxReplicaCount=WHOLE,
        triggers=listed(_KEDA_TRIGGER),
    ),
}
"""Schema of the `spec` by apiVersion and kind."""
