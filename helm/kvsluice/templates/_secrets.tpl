{{/* Which Secret which role sees: name of the volume, the Secret, and where it lies. Each role gets what it reads and
     nothing else: keys of scrapers where a worker has metrics of its own. The Job `up` checks all of it before it starts
     anything. */}}
{{- define "kvsluice.secretList" -}}
{{- $v := .root.Values -}}
{{- $job := eq .role "up" -}}
{{- $client := or (eq .role "gateway") $job -}}
{{- $stores := or (has .role (list "gateway" "decode" "both")) $job -}}
{{- $counts := and $v.metrics.podMonitor.enabled (has .role (list "prefill" "decode" "both")) -}}
{{- $ours := or (has .role (list "gateway" "prefill" "decode" "both")) $job -}}
- {volume: ray-token, secret: {{ include "kvsluice.secret.ray" .root }}, path: ray, keys: [auth_token]}
{{- if $ours }}
- {volume: fleet-token, secret: {{ include "kvsluice.secret.fleet" .root }}, path: fleet, keys: [fleet_token]}
{{- if $v.fleet.tlsSecret }}
- {volume: fleet-tls, secret: {{ $v.fleet.tlsSecret }}, path: fleet-tls, keys: [tls.crt, tls.key, ca.crt]}
{{- end }}
{{- end }}
{{- if and (or $client $counts) (not $v.auth.allowAnonymous) }}
- {volume: api-keys, secret: {{ include "kvsluice.secret.keys" .root }}, path: keys, keys: [keys.yaml]}
{{- end }}
{{- if and $client $v.tls.existingSecret }}
- {volume: tls, secret: {{ $v.tls.existingSecret }}, path: tls, keys: [tls.crt, tls.key{{ if $v.tls.clientCA }}, ca.crt{{ end }}]}
{{- end }}
{{- if $stores }}
{{- with include "kvsluice.secret.store" .root }}
- {volume: store, secret: {{ . }}, path: store, keys: [password]}
{{- end }}
{{- with include "kvsluice.secret.storeCA" .root }}
- {volume: store-ca, secret: {{ . }}, path: store-ca, keys: [ca.crt]}
{{- end }}
{{- end }}
{{- end -}}

{{- define "kvsluice.secretVolumes" -}}
{{- range fromYamlArray (include "kvsluice.secretList" .) }}
- name: {{ .volume }}
  secret:
    secretName: {{ .secret }}
    defaultMode: 288 # 0440
    items:
      {{- range .keys }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end }}
{{- end -}}

{{- define "kvsluice.secretMounts" -}}
{{- range fromYamlArray (include "kvsluice.secretList" .) }}
- {name: {{ .volume }}, mountPath: /etc/kvsluice/{{ .path }}, readOnly: true}
{{- end }}
{{- end -}}

{{/* What a Secret of the chart's own holds already, as whoever runs it has edited it, or else what is made for it.
     Arguments: old (its data), key, new. */}}
{{- define "kvsluice.kept" -}}
{{- ternary (index .old .key | default "" | b64dec) .new (hasKey .old .key) | toJson -}}
{{- end -}}
