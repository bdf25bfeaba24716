{{/* cluster.yaml, which `kvsluice up` reads: settings of everything, gateways, groups of workers. */}}
{{- define "kvsluice.ownSettings" -}}
{{- $v := .Values -}}
{{- $ports := fromYaml (include "kvsluice.ports" .) -}}
port: {{ int $v.service.grpcPort }}
http_port: {{ int $v.service.httpPort }}
worker_port: {{ $ports.worker }}
grace_s: 30
fleet_token_file: /etc/kvsluice/fleet/fleet_token
{{- if $v.fleet.tlsSecret }}
fleet_tls_cert_file: /etc/kvsluice/fleet-tls/tls.crt
fleet_tls_key_file: /etc/kvsluice/fleet-tls/tls.key
fleet_tls_ca_file: /etc/kvsluice/fleet-tls/ca.crt
fleet_tls_name: {{ $v.fleet.tlsName }}
{{- end }}
{{- with include "kvsluice.storeURL" . }}
store_url: {{ . | quote }}
{{- end }}
{{- if include "kvsluice.secret.store" . }}
store_password_file: /etc/kvsluice/store/password
{{- end }}
{{- if include "kvsluice.secret.storeCA" . }}
store_ca_file: /etc/kvsluice/store-ca/ca.crt
{{- end }}
{{- end -}}

{{/* What the doors for clients and scrapers are told: who may come in. */}}
{{- define "kvsluice.callers" -}}
{{- if .Values.auth.allowAnonymous }}
allow_anonymous: true
{{- else }}
api_keys_file: /etc/kvsluice/keys/keys.yaml
{{- end }}
{{- end -}}

{{- define "kvsluice.doors" -}}
{{ include "kvsluice.callers" . | trim }}
{{- if .Values.tls.existingSecret }}
tls_cert_file: /etc/kvsluice/tls/tls.crt
tls_key_file: /etc/kvsluice/tls/tls.key
{{- if .Values.tls.clientCA }}
tls_client_ca_file: /etc/kvsluice/tls/ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* Values are floats to Helm; a byte count in scientific notation would be no whole number to everybody. */}}
{{- define "kvsluice.settings" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- $whole := and (kindIs "float64" $value) (eq (toString $value) (toString (floor $value))) -}}
{{- $lines = append $lines (printf "%s: %s" $key (ternary (int64 $value | toString) (toJson $value) $whole)) -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{- define "kvsluice.checkSettings" -}}
{{- $own := list "host" "http_host" "port" "http_port" "worker_port" "device" "role" "prefill_workers" "decode_workers" "dashboard" "object_store_bytes" "allow_anonymous" "worker_metrics_port" -}}
{{- $own = concat $own (keys (fromYaml (include "kvsluice.ownSettings" .root))) -}}
{{- range $key, $value := .settings -}}
{{- if or (has $key $own) (hasPrefix "tls_" $key) (hasPrefix "fleet_" $key) (hasPrefix "store_url" $key) (hasSuffix "_file" $key) -}}
{{- fail (printf "%s.%s: is set by the chart itself; use the chart's values for addresses, secrets and devices" $.where $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kvsluice.clusterConfig" -}}
{{- include "kvsluice.checkSettings" (dict "root" . "settings" .Values.settings "where" "settings") -}}
{{- include "kvsluice.checkSettings" (dict "root" . "settings" .Values.gateway.settings "where" "gateway.settings") -}}
settings:
  {{- include "kvsluice.ownSettings" . | nindent 2 }}
  {{- include "kvsluice.settings" .Values.settings | nindent 2 }}
gateways:
  - name: gateway
    replicas: {{ int .Values.gateway.replicas }}
    resources: {num_cpus: {{ int .Values.gateway.cpus }}, custom: {kvsluice-gateway: 1}}
    settings:
      {{- include "kvsluice.doors" . | nindent 6 }}
      {{- with include "kvsluice.settings" .Values.gateway.settings }}
      {{- . | nindent 6 }}
      {{- end }}
groups:
  {{- range $name, $group := .Values.groups }}
  {{- include "kvsluice.checkSettings" (dict "root" $ "settings" (default dict $group.settings) "where" (printf "groups.%s.settings" $name)) }}
  - name: {{ $name }}
    role: {{ $group.role }}
    {{- if $.Values.autoscaling.enabled }}
    replicas: {min: {{ include "kvsluice.min" $group }}, max: {{ include "kvsluice.max" $group }}}
    {{- with $group.scaling }}
    scaling:
      {{- include "kvsluice.settings" . | nindent 6 }}
    {{- end }}
    {{- else }}
    replicas: {{ int $group.replicas }}
    # there is no spare pod that a new worker could start in before an old one has gone
    max_surge: 0
    max_unavailable: 1
    {{- end }}
    resources:
      num_cpus: {{ int $group.cpus }}
      num_gpus: {{ int (default 0 $group.gpus) }}
      custom: {kvsluice-{{ $name }}: 1}
    settings:
      device: {{ ternary "cuda" "cpu" (gt (int (default 0 $group.gpus)) 0) }}
      {{- if $.Values.metrics.podMonitor.enabled }}
      worker_metrics_port: {{ (fromYaml (include "kvsluice.ports" $)).workerMetrics }}
      {{- include "kvsluice.callers" $ | trim | nindent 6 }}
      {{- end }}
      {{- with include "kvsluice.settings" (default dict $group.settings) }}
      {{- . | nindent 6 }}
      {{- end }}
  {{- end }}
drain_s: {{ int .Values.drain.seconds }}
{{- end -}}
