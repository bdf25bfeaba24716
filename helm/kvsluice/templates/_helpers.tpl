{{/* Names and labels. */}}
{{- define "kvsluice.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough for what KubeRay and Kubernetes append. */}}
{{- define "kvsluice.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "kvsluice.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kvsluice.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "kvsluice.selector" -}}
app.kubernetes.io/name: {{ include "kvsluice.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvsluice.labels" -}}
{{ include "kvsluice.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: kvsluice
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "kvsluice.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* Secrets: named by the values, or the chart's own. */}}
{{- define "kvsluice.secret.keys" -}}
{{- default (printf "%s-keys" (include "kvsluice.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}
{{- define "kvsluice.secret.ray" -}}
{{- default (printf "%s-ray" (include "kvsluice.fullname" .)) .Values.ray.authSecret -}}
{{- end -}}
{{- define "kvsluice.secret.fleet" -}}
{{- default (printf "%s-fleet" (include "kvsluice.fullname" .)) .Values.fleet.tokenSecret -}}
{{- end -}}
{{- define "kvsluice.secret.store" -}}
{{- if .Values.redis.enabled -}}
{{- default (printf "%s-store" (include "kvsluice.fullname" .)) .Values.redis.existingSecret -}}
{{- else -}}
{{- .Values.redis.external.existingSecret -}}
{{- end -}}
{{- end -}}
{{- define "kvsluice.secret.storeCA" -}}
{{- if .Values.redis.enabled -}}{{ .Values.redis.tlsSecret }}{{- else -}}{{ .Values.redis.external.caSecret }}{{- end -}}
{{- end -}}

{{- define "kvsluice.storeURL" -}}
{{- if .Values.redis.enabled -}}
{{- printf "%s://kvsluice@%s-redis:6379" (ternary "rediss" "redis" (ne .Values.redis.tlsSecret "")) (include "kvsluice.fullname" .) -}}
{{- else -}}
{{- .Values.redis.external.url -}}
{{- end -}}
{{- end -}}

{{/* Ports that the chart chooses, in one place; the NetworkPolicies open these and no others. */}}
{{- define "kvsluice.ports" -}}
worker: 8034
gcs: 6379
client: 10001
nodeManager: 6380
objectManager: 6381
workerMin: 10002
workerMax: 10999
metrics: 8080
workerMetrics: 8035
redis: 6379
{{- end -}}

{{- define "kvsluice.hasGenerated" -}}
{{- if and .Values.auth.generate (not .Values.auth.existingSecret) (not .Values.auth.allowAnonymous) }}true{{ end -}}
{{- end -}}

{{- define "kvsluice.drainGrace" -}}
{{- add (int .Values.drain.seconds) 60 -}}
{{- end -}}
