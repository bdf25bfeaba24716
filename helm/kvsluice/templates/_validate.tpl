{{/* What a schema cannot say, or not readably. */}}
{{- define "kvsluice.validate" -}}
{{- $v := .Values -}}
{{- if and $v.auth.allowAnonymous $v.auth.existingSecret -}}
{{- fail "auth.allowAnonymous: auth.existingSecret is set as well; allowed: one of them" -}}
{{- end -}}
{{- if not (or $v.auth.allowAnonymous $v.auth.existingSecret $v.auth.generate) -}}
{{- fail "auth: nobody could call; allowed: auth.existingSecret, auth.generate or auth.allowAnonymous" -}}
{{- end -}}
{{- if and $v.tls.clientCA (not $v.tls.existingSecret) -}}
{{- fail "tls.clientCA: connections are plaintext; allowed: with tls.existingSecret" -}}
{{- end -}}
{{- $download := $v.modelCache.download -}}
{{- if and $download.repo (not (and $v.modelCache.enabled $download.folder)) -}}
{{- fail "modelCache.download.repo: there is no place for it; allowed: with modelCache.enabled and modelCache.download.folder" -}}
{{- end -}}
{{- if and $v.redis.enabled $v.redis.external.url -}}
{{- fail "redis.external.url: redis.enabled is set as well; allowed: one of them" -}}
{{- end -}}
{{- range $role := list "prefill" "decode" -}}
{{- $found := false -}}
{{- range $name, $group := $v.groups -}}
{{- if $group -}}{{- if or (eq $group.role $role) (eq $group.role "both") -}}{{- $found = true -}}{{- end -}}{{- end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "groups: none has the role %s; allowed: at least one of it, or of role both" $role) -}}
{{- end -}}
{{- end -}}
{{- range $name, $group := $v.groups -}}
{{- if eq $name "gateway" "head" -}}{{- fail (printf "groups.%s: is taken; allowed: any other name" $name) -}}{{- end -}}
{{- if gt (include "kvsluice.min" $group | int) (include "kvsluice.max" $group | int) -}}
{{- fail (printf "groups.%s.minReplicas: is above maxReplicas" $name) -}}
{{- end -}}
{{- $ranks := include "kvsluice.ranks" (dict "common" $v.settings "group" $group) | int -}}
{{- $gpus := int (default 0 $group.gpus) -}}
{{- if and $gpus (ne $gpus $ranks) -}}
{{- fail (printf "groups.%s.gpus: got %d for a worker of %d ranks; allowed: %d, or another tensor_parallel_size in the group's settings" $name $gpus $ranks $ranks) -}}
{{- end -}}
{{- end -}}
{{- range $kind := list "keda" "hpa" -}}
{{- $hook := index $v.autoscaling.hooks $kind -}}
{{- if and $hook.enabled (not $hook.scaleTargetRef.name) -}}
{{- fail (printf "autoscaling.hooks.%s.scaleTargetRef.name: missing; allowed: something with a scale subresource" $kind) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Processes of a worker that a model is cut over, each with a GPU of its own. */ -}}
{{- define "kvsluice.ranks" -}}
{{- $key := "tensor_parallel_size" -}}
{{- $settings := merge dict (default dict .group.settings) (default dict .common) -}}
{{- index $settings (printf "%s_%s" .group.role $key) | default (index $settings $key) | default 1 | int -}}
{{- end -}}

{{- define "kvsluice.min" -}}
{{- ternary .minReplicas .replicas (hasKey . "minReplicas") | int -}}
{{- end -}}
{{- define "kvsluice.max" -}}
{{- ternary .maxReplicas .replicas (hasKey . "maxReplicas") | int -}}
{{- end -}}
