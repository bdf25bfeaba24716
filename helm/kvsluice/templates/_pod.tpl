{{/* A pod of Ray. Arguments: root, role (head, gateway, prefill, decode, both), group (its name), spec (its values). */}}
{{- define "kvsluice.rayPod" -}}
{{- $root := .root -}}
{{- $role := .role -}}
{{- $spec := .spec -}}
{{- $ports := fromYaml (include "kvsluice.ports" $root) -}}
{{- $gpus := int (default 0 $spec.gpus) -}}
metadata:
  labels:
    {{- include "kvsluice.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $role }}
    kvsluice/group: {{ .group }}
    kvsluice/ray: "true"
spec:
  automountServiceAccountToken: {{ and (eq $role "head") $root.Values.autoscaling.enabled }}
  {{- if not (and (eq $role "head") $root.Values.autoscaling.enabled) }}
  serviceAccountName: {{ include "kvsluice.fullname" $root }}
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ ternary 60 (include "kvsluice.drainGrace" $root | int) (eq $role "head") }}
  securityContext:
    {{- toYaml $root.Values.podSecurityContext | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and $gpus $root.Values.runtimeClassName }}
  runtimeClassName: {{ $root.Values.runtimeClassName }}
  {{- end }}
  {{- with $spec.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $spec.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $spec.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq $role "head") }}
      image: {{ include "kvsluice.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      env:
        {{- include "kvsluice.env" (dict "Values" $root.Values "models" (ne $role "head")) | nindent 8 }}
      ports:
        - {name: metrics, containerPort: {{ $ports.metrics }}}
        {{- if eq $role "head" }}
        - {name: gcs-server, containerPort: {{ $ports.gcs }}}
        - {name: client, containerPort: {{ $ports.client }}}
        {{- else if eq $role "gateway" }}
        - {name: grpc, containerPort: {{ int $root.Values.service.grpcPort }}}
        - {name: http, containerPort: {{ int $root.Values.service.httpPort }}}
        {{- else }}
        - {name: worker, containerPort: {{ $ports.worker }}}
        {{- if $root.Values.metrics.podMonitor.enabled }}
        - {name: worker-metrics, containerPort: {{ $ports.workerMetrics }}}
        {{- end }}
        {{- end }}
      {{- include "kvsluice.probes" (dict "root" $root "role" $role "ports" $ports) | nindent 6 }}
      {{- if ne $role "head" }}
      lifecycle:
        preStop:
          exec:
            # what runs here goes on to its end, or elsewhere; nothing new comes meanwhile
            command: [sh, -c, 'exec kvsluice drain --address auto --node "$POD_IP"']
      {{- end }}
      resources:
        {{- include "kvsluice.resources" (dict "root" $root "spec" $spec "gpus" $gpus) | nindent 8 }}
      securityContext:
        {{- include "kvsluice.containerSecurity" $root | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- include "kvsluice.secretMounts" (dict "root" $root "role" $role) | nindent 8 }}
        {{- if and $root.Values.modelCache.enabled (ne $role "head") }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $root.Values.shmSize }}}
    {{- include "kvsluice.secretVolumes" (dict "root" $root "role" $role) | nindent 4 }}
    {{- if and $root.Values.modelCache.enabled (ne $role "head") }}
    - name: models
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-models" (include "kvsluice.fullname" $root)) $root.Values.modelCache.existingClaim }}
    {{- end }}
{{- end -}}

{{- define "kvsluice.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* The environment of whatever speaks to Ray. Arguments: Values, models (whether it reads models). */}}
{{- define "kvsluice.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /etc/kvsluice/ray/auth_token}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: HOME, value: /tmp}
{{- if .models }}
- {name: HF_HOME, value: {{ ternary "/models" "/tmp/huggingface" .Values.modelCache.enabled }}}
- {name: HF_HUB_OFFLINE, value: "1"} # models are folders; nobody asks huggingface.co for one
{{- end }}
{{- end -}}

{{/* Limits hold the GPUs; requests and limits of those are always equal. */}}
{{- define "kvsluice.resources" -}}
{{- $resources := deepCopy .spec.resources -}}
{{- if .gpus -}}
{{- $limits := set (default dict $resources.limits) .root.Values.gpuResource .gpus -}}
{{- $resources = set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Ray itself answers grpc.health.v1 on its own ports: GCS on the head, the raylet everywhere. A gateway is ready when
     requests would be served, a worker when it listens. Kubernetes' grpc probes speak no TLS. */}}
{{- define "kvsluice.probes" -}}
{{- $node := ternary .ports.gcs .ports.nodeManager (eq .role "head") -}}
startupProbe:
  grpc: {port: {{ $node }}}
  periodSeconds: 10
  failureThreshold: 180 # half an hour: images and models are large
livenessProbe:
  grpc: {port: {{ $node }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if eq .role "head" }}
  grpc: {port: {{ $node }}}
  {{- else if eq .role "gateway" }}
  {{- if not .root.Values.tls.existingSecret }}
  grpc: {port: {{ int .root.Values.service.grpcPort }}, service: kvsluice.v1.Generation}
  {{- else if .root.Values.tls.clientCA }}
  tcpSocket: {port: {{ int .root.Values.service.grpcPort }}}
  {{- else }}
  httpGet: {port: {{ int .root.Values.service.httpPort }}, path: /ready, scheme: HTTPS}
  {{- end }}
  {{- else }}
  tcpSocket: {port: {{ .ports.worker }}}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}
